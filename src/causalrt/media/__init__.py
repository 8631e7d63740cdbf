"""Media files: `read` turns pictures (`stills`, Pillow) and clips (`clips`, PyAV) into frames; `video_file` writes MP4."""
