"""What a build says of an engine's network, read back: strict, since a bundle may come from anywhere."""

import copy

import pytest

from causalrt.engines.network_record import EngineMemory, NetworkRecord
from causalrt.plain import from_plain

NETWORK = {
    "layers": {"CAST": 2},
    "attentions": [{"key_source": "k.0.0", "decomposable": False, "has_lengths": True}],
    "collectives": [{"name": "a", "ranks": 8}],
    "constants": [{"sha256": "00", "bytes": 4}],
    "weight_bytes": 10,
    "cache_updates": 2,
    "plugins": {"qk_norm_rope": 2},
    "inputs": [{"name": "k.0.0", "shape": [1, -1, 16], "dtype": "BF16"}],
    "outputs": [{"name": "flow", "shape": [6, 16], "dtype": "BF16"}],
    "memory": {
        "activation_bytes": 300,
        "scratch_bytes": 200,
        "weights_bytes": 10,
        "device_persistent_bytes": 0,
        "host_persistent_bytes": 80,
    },
}


def test_what_a_build_writes():
    record = from_plain(NetworkRecord, NETWORK, "step.engine")
    assert (record.weight_bytes, record.constant_bytes, record.collectives[0].ranks) == (10, 4, 8)
    assert record.attentions[0].has_lengths
    assert record.inputs[0].shape == (1, -1, 16)
    assert record.inputs[0].num_bytes(dynamic_size=5) == 160
    assert record.outputs[0].name == "flow"
    assert record.memory == EngineMemory(**NETWORK["memory"])
    without = {key: value for key, value in NETWORK.items() if key != "memory"}
    assert from_plain(NetworkRecord, without, "step.engine").memory is None, "an earlier version wrote none"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("layers",), [["A", 1]]),
        (("layers", "CAST"), "b"),
        (("layers", "CAST"), None),
        (("attentions",), {}),
        (("attentions", 0), None),
        (("attentions", 0, "decomposable"), "x"),
        (("attentions", 0, "has_lengths"), []),
        (("attentions", 0, "key_source"), 1),
        (("collectives", 0, "ranks"), "2"),
        (("collectives", 0, "ranks"), 2.5),
        (("constants", 0, "bytes"), "4"),
        (("constants", 0, "bytes"), float("inf")),
        (("constants", 0, "sha256"), None),
        (("weight_bytes",), True),
        (("cache_updates",), None),
        (("inputs", 0, "shape"), "12"),
        (("inputs", 0, "shape"), [1.5]),
        (("inputs", 0, "dtype"), "FP8"),
        (("inputs", 0, "name"), 3),
        (("outputs",), None),
        (("memory",), 300),
        (("memory",), {"activation_bytes": 300}),
        (("memory", "scratch_bytes"), "200"),
    ],
)
def test_broken(path, value):
    network = copy.deepcopy(NETWORK)
    place = network
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(TypeError, match=r"step\.engine"):
        from_plain(NetworkRecord, network, "step.engine")


@pytest.mark.parametrize("plain", [None, [], {}, "x"])
def test_no_network_at_all(plain):
    with pytest.raises(TypeError, match=r"step\.engine"):
        from_plain(NetworkRecord, plain, "step.engine")
