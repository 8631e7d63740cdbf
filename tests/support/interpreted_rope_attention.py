"""Runs `rope_attention` cases in Triton's interpreter: one JSON line in, one JSON line out. Started by its test.

It is a process of its own because Triton looks at TRITON_INTERPRET once, and stays up because its imports take seconds.
"""

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from support.rope_attention_cases import run


def repair_bfloat16():
    """Triton 3.7's interpreter multiplies the bit patterns of bfloat16, and cuts float32 off where a GPU rounds."""
    builder = interpreter.InterpreterBuilder
    create_dot, cast_impl = builder.create_dot, builder.cast_impl

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        bits = x.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def rounding_cast(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return cast_impl(self, src, dst_type)
        rounded = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16().view(torch.int16)
        return interpreter.TensorHandle(rounded.numpy().view(np.uint16), tl.bfloat16)

    builder.create_dot = lambda self, a, b, *rest: create_dot(self, widened(a), widened(b), *rest)
    builder.cast_impl = rounding_cast
    builder.create_fp_trunc = rounding_cast


if __name__ == "__main__":
    torch.set_num_threads(1)
    repair_bfloat16()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(run(json.loads(line))) + "\n")
        sys.stdout.flush()
