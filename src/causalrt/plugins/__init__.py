"""Fused and custom ops: each has a torch op with an eager reference, and an ONNX form.

Importing a module of this package registers its op; every op is defined in exactly one module.
"""
