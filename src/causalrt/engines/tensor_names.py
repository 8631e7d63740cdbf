"""Names of the step graph's tensors that its two sides agree on: what a build writes, and what an executor binds."""

from causalrt.model.wan.conditioning import is_prompt_name

KV_ROWS = "kv_rows"
"""Filled rows of the KV slots: an input where they are bound whole, and for fused ops."""


def is_callers(name: str) -> bool:
    """Whether a tensor is memory of the session: KV slots (`k.0.0`, `v.0.0.written`), or what was made of its prompt."""
    return name.startswith(("k.", "v.")) or is_prompt_name(name)
