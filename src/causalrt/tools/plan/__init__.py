"""What a machine would take for a recipe, before there is such a machine or such a bundle.

    config, head layout --> work (counts) --> machine (roofline of a GPU, or measured costs) --> forecast --> simulation

Nothing here loads weights or opens a bundle. Counts are exact and tested against what the runtime counts; times are
predictions, and carry the spread of the assumptions that they rest on.
"""
