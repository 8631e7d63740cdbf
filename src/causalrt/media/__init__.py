"""Pictures and clips in: `read` makes frames of a video's size and rate of what `stills` (Pillow) and `clips` (PyAV) decode."""
