"""The offline build: checkpoint -> model -> step graph -> passes -> ONNX -> segments -> bundle; never imported at runtime."""
