"""Offline: checkpoint -> model -> step graph -> passes -> ONNX -> segments -> bundle. The runtime never imports it."""
