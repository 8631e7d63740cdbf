"""Trains the demo's model: `python -m train_demo` (docs/demo.md).

world, clips      the content of clips, drawn from formulas; clips in the form that the model takes
vocabulary        the words of its prompts
forward, train    the forward pass over all chunks of a batch, with the model's own parameters; the training loop
judge             recognises from the pixels of a clip what it shows
command           arguments, progress, files
"""
