"""Predictions for a recipe on a machine, before there is such a machine or a bundle.

    config, head layout --> work (counts) --> machine (roofline of a GPU, or measured costs) --> forecast --> timeline

Nothing here loads weights or opens a bundle. Counts are exact and tested against what the runtime counts. Times are
predictions, with the spread of the assumptions that they rest on.
"""
