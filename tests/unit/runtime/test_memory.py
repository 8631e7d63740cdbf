import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from causalrt.config import override
from causalrt.engines.bundle import VAE_WEIGHTS
from causalrt.errors import ExecutorError, OutOfMemoryError
from causalrt.export.checkpoint import model_shapes
from causalrt.layout import layout_from_config
from causalrt.model.codecs.vae_checkpoint import VaeConfig
from causalrt.model.wan.transformer import num_parameters
from causalrt.recipes import RECIPES, recipe
from causalrt.runtime import memory
from causalrt.runtime.kv_slots import KVSlots
from causalrt.runtime.memory import (
    ELEMENT_BYTES,
    UNLIMITED,
    DecoderMemory,
    MemoryEstimate,
    available_bytes,
    check_memory,
    decoder_memory,
    device_free_bytes,
    device_sessions,
    is_out_of_memory,
    predict_memory,
)

DECODER = DecoderMemory(weights_bytes=2**29, cache_bytes=2**28, activation_bytes=2**28)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SMALL = MemoryEstimate(
    weights_bytes=3 * 2**30, kv_bytes=2**30, cross_kv_bytes=2**29, activation_bytes=2**28, attention_bytes=2**28
)


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("name", RECIPES)
def test_weights_are_those_of_the_checkpoint(name, precision):
    config = override(recipe(name), {"build.precision": precision})
    stored = sum(math.prod(shape) for shape in model_shapes(config.model).values())
    assert num_parameters(config.model) == stored
    predicted = predict_memory(config, "eager").weights_bytes
    assert predicted == stored * DTYPES[precision].itemsize
    assert ELEMENT_BYTES[precision] == DTYPES[precision].itemsize


def test_the_released_model_has_its_parameters():
    assert num_parameters(recipe("wan_1_3b_480p").model) == 1_418_996_800  # model_spec section 8


@pytest.mark.parametrize("world_size", [1, 2, 8])
@pytest.mark.parametrize("plan", ["balanced", "padded", "grouped"])
@pytest.mark.parametrize("name", RECIPES)
def test_kv_slots_allocate_what_was_predicted(name, plan, world_size):
    changes = {"build.world_size": str(world_size), "build.head_plan": plan, "build.precision": "bfloat16"}
    config = override(recipe(name), changes)
    layout = layout_from_config(config)
    with torch.device("meta"):  # the sizes of 14B, without its bytes
        slots = KVSlots(config, layout, torch.bfloat16)
    last = config.video.horizon_frames - config.video.chunk_frames
    allocated = sum(t.untyped_storage().nbytes() for layer in slots.filled(last) for pair in layer for t in pair)
    assert allocated == predict_memory(config, "eager").kv_bytes
    filled = sum(t.nbytes for layer in slots.filled(last) for pair in layer for t in pair)
    assert filled == allocated, "by the last chunk every slot is in use"


def test_kv_cache_of_the_released_model():
    config = override(recipe("wan_1_3b_480p"), {"build.precision": "bfloat16"})
    assert predict_memory(config, "eager").kv_bytes == pytest.approx(6.04e9, rel=1e-3)  # model_spec section 8


def test_cross_attention_keys_and_values():
    config = recipe("tiny")
    assert predict_memory(config, "eager").cross_kv_bytes == 2 * 2 * 8 * 48 * 4


def test_prediction_grows_with_the_window_alone():
    short, long = (override(recipe("tiny"), {"video.window_frames": w}) for w in ("7", "12"))
    before, after = (dataclasses.asdict(predict_memory(config, "eager")) for config in (short, long))
    assert {name for name in before if before[name] != after[name]} == {"kv_bytes"}
    assert after["kv_bytes"] * 7 == before["kv_bytes"] * 12


@pytest.mark.parametrize(
    ("executor", "device", "sets"),
    [("eager", "cuda", 1), ("inductor", "cuda", 1), ("onnxruntime", "cpu", 1), ("onnxruntime", "cuda", 2)]
    + [(flavour, "cuda", 2) for flavour in ("tensorrt", "tensorrt_rtx")],
)
def test_weights_of_two_kinds_of_step(executor, device, sets):
    config = override(recipe("tiny"), {"video.horizon_frames": "13", "video.independent_first_frame": "true"})
    one_set = num_parameters(config.model) * 4
    assert predict_memory(config, executor, device=device).weights_bytes == sets * one_set
    assert predict_memory(recipe("tiny"), executor, device=device).weights_bytes == one_set


def test_onnxruntime_holds_all_scores_but_in_float32():
    config = recipe("wan_1_3b_480p")
    rows, keys, channels = config.tokens_per_chunk, config.slot_rows, config.model.dim
    assert predict_memory(config, "eager").attention_bytes == 0
    assert predict_memory(config, "onnxruntime").attention_bytes == 4 * channels * (rows + 2 * keys)
    low = override(config, {"build.precision": "bfloat16"})
    assert predict_memory(low, "onnxruntime").attention_bytes == 2 * config.model.num_heads * rows * keys


@pytest.mark.parametrize("executor", ["eager", "onnxruntime"])
@pytest.mark.parametrize("name", RECIPES)
def test_total_is_the_sum_of_positive_parts(name, executor):
    predicted = predict_memory(recipe(name), executor)
    parts = dataclasses.asdict(predicted)
    assert predicted.total_bytes == sum(parts.values())
    assert all(value > 0 for part, value in parts.items() if part != "attention_bytes")


# ---- check_memory


def test_refusal_says_what_is_needed_what_is_free_and_what_to_do(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 7 * 2**30)
    with pytest.raises(OutOfMemoryError) as caught:
        check_memory(SMALL, ranks=2, shared_weights=False)
    message = str(caught.value)
    parts = ["weights 3.00", "kv 1.00", "cross_kv 0.50", "activation 0.25", "attention 0.25"]
    for part in ("2 rank", "10.00 GiB", "7.00 are free", "--set video.window_frames", "precision", *parts):
        assert part in message


@pytest.mark.parametrize(("free", "ranks"), [(5 * 2**30, 1), (10 * 2**30, 2), (None, 64)])
def test_what_fits_passes(monkeypatch, free, ranks):
    monkeypatch.setattr(memory, "available_bytes", lambda: free)
    check_memory(SMALL, ranks=ranks, shared_weights=False)


def test_one_byte_short_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: SMALL.total_bytes - 1)
    with pytest.raises(OutOfMemoryError):
        check_memory(SMALL, ranks=1, shared_weights=False)


def test_this_host_says_what_is_free():
    assert memory.available_bytes() is None or memory.available_bytes() > 2**20


def test_a_host_that_does_not_say(monkeypatch):
    def missing(self):
        raise FileNotFoundError(self)

    monkeypatch.setattr(memory.Path, "read_text", missing)
    assert memory.available_bytes() is None


def test_control_groups_limit_what_is_available(monkeypatch):
    monkeypatch.setattr(memory, "memory_limits", lambda: [(2**62, 2**61), (5000, 4300)])
    assert available_bytes() == 4300
    monkeypatch.setattr(memory, "memory_limits", list)
    assert available_bytes() > 2**20


def test_shared_weights_count_once(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 3 * SMALL.total_bytes - 2 * SMALL.weights_bytes)
    check_memory(SMALL, ranks=3, shared_weights=True)
    with pytest.raises(OutOfMemoryError):
        check_memory(SMALL, ranks=3, shared_weights=False)


# ---- how many sessions fit


@pytest.mark.parametrize("more", [0, 1, 3])
@pytest.mark.parametrize("decoder", [None, DECODER], ids=["latents", "frames"])
def test_sessions_on_a_host(monkeypatch, more, decoder):
    session = 2 * SMALL.session_bytes + (decoder.cache_bytes if decoder else 0)
    first = 2 * SMALL.total_bytes + (decoder.total_bytes if decoder else 0)
    monkeypatch.setattr(memory, "available_bytes", lambda: first + (more + 1) * session - 1)
    assert check_memory(SMALL, ranks=2, shared_weights=False, decoder=decoder) == 1 + more
    monkeypatch.setattr(memory, "available_bytes", lambda: None)
    assert check_memory(SMALL, ranks=2, shared_weights=False, decoder=decoder) == UNLIMITED


def test_a_decoder_that_does_not_fit_is_named(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: SMALL.total_bytes)
    with pytest.raises(
        OutOfMemoryError, match=r"1 rank\(s\) and the decoder need .*; the decoder: weights 0.50, cache 0.25"
    ):
        check_memory(SMALL, ranks=1, shared_weights=False, decoder=DECODER)


def test_sessions_on_gpus():
    working = SMALL.activation_bytes + SMALL.attention_bytes
    free = [working + 5 * SMALL.session_bytes, working + 4 * SMALL.session_bytes]
    assert device_sessions(SMALL, free, None, None, graph_bytes=0, shared=True) == 4
    own = DECODER.activation_bytes + 3 * DECODER.cache_bytes
    assert device_sessions(SMALL, free, DECODER, own, graph_bytes=0, shared=False) == 3
    beside = working + DECODER.activation_bytes + 2 * (SMALL.session_bytes + DECODER.cache_bytes)
    for first, second in ((beside, 2 * beside), (2 * beside, beside)):  # either may have loaded last
        assert device_sessions(SMALL, [first, *free], DECODER, second, graph_bytes=0, shared=True) == 2
    with pytest.raises(OutOfMemoryError, match="a session needs"):
        device_sessions(SMALL, [working, *free], None, None, graph_bytes=0, shared=True)


def test_graphs_of_a_session_count_on_gpus():
    working, graphs = SMALL.activation_bytes + SMALL.attention_bytes, SMALL.session_bytes // 2
    free = [working + 6 * SMALL.session_bytes, working + 7 * SMALL.session_bytes]
    assert device_sessions(SMALL, free, None, None, graph_bytes=graphs, shared=True) == 4


def test_a_pool_of_cuda_graphs_is_not_free_memory(monkeypatch):
    """torch keeps what a graph's pool holds for graphs, used or not; another GPU's segments are nobody's business."""

    def segment(device, pool, total, allocated):
        return {"device": device, "segment_pool_id": pool, "total_size": total, "allocated_size": allocated}

    segments = [
        segment(1, (0, 0), 100, 60),  # 40 are free for the next tensor
        segment(1, (0, 0), 30, 0),
        segment(1, (0, 7), 5000, 1),  # of the graphs
        segment(0, (0, 0), 900, 0),
    ]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10_000, 80_000))
    assert device_free_bytes(torch.device("cuda", 1)) == 10_000 + 40 + 30
    assert device_free_bytes(torch.device("cpu")) is None


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("bfc_arena.cc:376 AllocateRawInternal Failed to allocate memory for requested buffer of size 64"),
        ExecutorError("enqueueV3: Error Code 2: OutOfMemory (Requested size was 64 bytes.)"),
    ],
    ids=lambda error: f"{type(error).__name__}: {error}"[:40],
)
def test_errors_of_memory_that_has_run_out(error):
    assert is_out_of_memory(error)


def test_other_errors_are_not_of_memory():
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied (8x5 and 24x48)"))


def test_caches_of_the_released_vae():
    config = override(recipe("wan_1_3b_480p"), {"build.precision": "bfloat16"})

    bundle = SimpleNamespace(vae=VaeConfig(), config=config, sizes={VAE_WEIGHTS: 254 * 10**6})
    eager, graphs = (decoder_memory(bundle, name) for name in ("eager", "onnxruntime"))
    assert eager.cache_bytes == 2 * 944_286_720  # as measured with diffusers
    assert graphs.cache_bytes == 2 * eager.cache_bytes
    assert eager.weights_bytes == 2 * 254 * 10**6
    assert 4 * 2**30 < eager.activation_bytes < 5 * 2**30
    assert graphs.activation_bytes > 2 * eager.activation_bytes
