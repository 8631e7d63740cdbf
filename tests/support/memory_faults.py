"""Ranks and decoders that run out of memory when a test says so."""

import textwrap
from pathlib import Path

import pytest

INJECTION = """
    import os, sys
    if "causalrt.runtime.worker" in sys.orig_argv:
        import torch
        from causalrt.runtime import {module}
        original = {module}.{name}

        def replacing(*args, **options):
            here = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
            if os.path.exists({flag!r}) and here == {rank}:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\\nAdvice of torch's")
            return original(*args, **options)

        {module}.{name} = replacing
"""


def run_out_of_memory(monkeypatch: pytest.MonkeyPatch, folder: Path, module: str, name: str, *, rank: int = 0) -> Path:
    """Have a function of a module of `causalrt.runtime` find no memory on one rank, for as long as the file returned is there.

    For processes that are started after this.
    """
    flag = folder / "out-of-memory"
    text = INJECTION.format(module=module, name=name, rank=rank, flag=str(flag))
    injected = folder / "injection"
    injected.mkdir()
    (injected / "sitecustomize.py").write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(injected)
    return flag
