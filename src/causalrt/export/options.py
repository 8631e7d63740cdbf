"""Options of a build that are not part of its config."""

from typing import Literal

CollectivesMode = Literal["engine", "runtime"]
"""Who exchanges between ranks under TensorRT: one engine for the whole step, or the runtime between segments."""

FrontEnd = Literal["onnx", "torch-tensorrt"]
"""What makes TensorRT's network of the traced step."""

FusedOpsMode = Literal["on", "off", "auto"]
"""Whether self-attention is made of the fused ops; `auto` is what has been measured to be faster, and so far nothing has."""
