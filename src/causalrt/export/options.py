"""Options of a build that are not part of its config."""

from typing import Literal

CollectivesMode = Literal["engine", "runtime"]
"""Where all-to-alls run under TensorRT: inside one engine for the whole step, or in the runtime between segments."""

FrontEnd = Literal["onnx", "torch-tensorrt"]
"""The front end that turns the traced step into a TensorRT network."""

FusedOpsMode = Literal["on", "off", "auto"]
"""Whether self-attention uses the fused ops; `auto` enables them where measured to be faster, so far nowhere."""
