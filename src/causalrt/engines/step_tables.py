"""Tables that the graphs of a step hold as constants, to compare with the constants that a build wrote."""

import hashlib
from collections import Counter
from typing import Any

import numpy as np
import torch

from causalrt.engines.bundle import Bundle
from causalrt.engines.network_record import NetworkRecord
from causalrt.layout import layouts_from_config
from causalrt.model.wan.relative_rope import RelativeRope
from causalrt.model.wan.rope import rope_tables


def expected_constants(bundle: Bundle, step: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """The tables that the graphs of a step hold as constants, by name: rotary angles, and the packing of exchanges."""
    layout, config = layouts_from_config(bundle.config)[step], bundle.config
    if config.video.time_index == "relative" and config.slot_rows == config.tokens_per_chunk:
        # There are only staging slots: no table depends on `first_frame`, so the exporter folds the lookups.
        slots = RelativeRope(config)(torch.zeros(1, dtype=torch.int64))
        rotary = dict(zip(("slot_cos", "slot_sin"), slots, strict=True))
    elif config.video.time_index == "relative":
        rotary = {name: table for name, table in RelativeRope(config).named_buffers() if table.is_floating_point()}
    else:
        rotary = dict(rope_tables(config, layout).constants())
    tables = {name: table.numpy() for name, table in rotary.items()}
    if bundle.fused_ops:
        tables["scatter_destinations"] = layout.scatter_destinations()
    elif layout.world_size > 1:
        tables["scatter_index"] = layout.scatter_index().ravel()
    if layout.world_size > 1:
        tables["gather_index"] = layout.gather_index()
    return tables


def check_constants(bundle: Bundle, step: int, networks: list[NetworkRecord]) -> dict[str, dict[str, Any]]:
    """Shape, type and size of each table, and the number of constants of the networks that equal it bit for bit."""
    digests = Counter(constant.sha256 for network in networks for constant in network.constants)
    return {
        name: {
            "shape": list(table.shape),
            "dtype": str(table.dtype),
            "bytes": table.nbytes,
            "equal_constants": digests[hashlib.sha256(np.ascontiguousarray(table).tobytes()).hexdigest()],
        }
        for name, table in expected_constants(bundle, step).items()
    }
