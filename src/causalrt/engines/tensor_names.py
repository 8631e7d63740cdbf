"""Names of the step graph's tensors that its two sides agree on: what a build writes, and what an executor binds."""

KV_ROWS = "kv_rows"
"""Filled rows of the KV slots: an input where they are bound whole, and for fused ops."""


def is_callers(name: str) -> bool:
    """Memory of the session: KV slots (`k.0.0`, `v.0.0.written`) and the prompt's keys and values (`cross_k.0`)."""
    return name.startswith(("k.", "v.", "cross_k.", "cross_v."))
