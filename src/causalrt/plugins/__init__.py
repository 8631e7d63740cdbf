"""Fused and custom ops: for each, the torch op with its eager reference, and its ONNX form.

Importing a module of this package registers its op; every op lives in exactly one module.
"""
