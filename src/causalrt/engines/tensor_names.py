"""Names of the step graph's tensors on which the build and the executors agree."""

from causalrt.model.wan.conditioning import is_prompt_name

KV_ROWS = "kv_rows"
"""Number of filled rows of the KV slots: an input where whole slots are bound, and for fused ops."""


def is_callers(name: str) -> bool:
    """Whether a tensor belongs to the session: KV slots (`k.0.0`, `v.0.0.written`), or the conditioning of its prompt."""
    return name.startswith(("k.", "v.")) or is_prompt_name(name)
