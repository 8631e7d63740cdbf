"""How the demo's model came about: `python -m train_demo` (docs/demo.md).

world, clips      what is shown, drawn from formulas; as the model sees it
vocabulary        the words of its prompts
forward, train    all chunks of a batch at once, by the model's own parameters; the loop
judge             what a clip shows, told from its pixels
command           arguments, progress, files
"""
