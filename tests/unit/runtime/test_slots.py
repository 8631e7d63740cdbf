import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from causalrt.config import Config, VideoConfig, override
from causalrt.layout import SlotPlan, history_lengths, layout_from_config, slots_from_config
from causalrt.recipes import recipe
from causalrt.runtime.kv_slots import KVSlots

PASSES = 5  # four denoising steps and the context pass


def chunks_of(*, chunk, chunks, first=None):
    """(first frame, frames) of each chunk; the first chunk has `first` frames, or as many as the others."""
    first = first or chunk
    return [(0, first), *((first + c * chunk, chunk) for c in range(chunks - 1))]


def reference_windows(*, chunk, window, sink, chunks, first=None):
    """Frames attended in every pass of every chunk, by the reference's cache rules (model_spec section 5)."""
    capacity = (
        sum(frames for _, frames in chunks_of(chunk=chunk, chunks=chunks, first=first)) if window is None else window
    )
    slots = [None] * capacity
    global_end = local_end = 0
    for c, (start, frames) in enumerate(chunks_of(chunk=chunk, chunks=chunks, first=first)):
        for _ in range(PASSES):
            end = start + frames
            local = local_end + (end - global_end)
            if window is not None and end > global_end and frames + local_end > capacity:
                evicted = frames + local_end - capacity
                keep = local_end - evicted - sink
                slots[sink : sink + keep] = slots[sink + evicted : sink + evicted + keep]
                local -= evicted
            slots[local - frames : local] = range(start, end)
            attended = slots[max(0, local - capacity) : local]
            assert len(set(attended)) == len(attended)
            yield c, set(attended)
            global_end, local_end = end, local


def plan_windows(plan: SlotPlan, chunks: int):
    """Frames attended in every pass of every chunk, by the slot plan: staging is written, the filled prefix is read."""
    slots = [None] * plan.capacity_frames
    for c, (start, frames) in enumerate(
        chunks_of(chunk=plan.step_frames[0], chunks=chunks, first=plan.step_frames[-1])
    ):
        step = plan.step_frames.index(frames)
        filled = plan.valid_frames(start, step=step)
        for _ in range(PASSES):
            slots[:frames] = range(start, start + frames)
            assert None not in slots[:filled]
            assert set(slots[filled:]) <= {None}, "the filled slots are no prefix"
            assert len(set(slots[:filled])) == filled, "a frame is attended twice"
            yield c, set(slots[:filled])
        moves = list(plan.commits(start, step=step))
        assert len(moves) <= frames
        for staged, slot in moves:
            assert 0 <= staged < frames
            assert plan.staging_frames <= slot < plan.capacity_frames
            slots[slot] = slots[staged]


def video(*, chunk, window, sink, chunks, first=None) -> Config:
    geometry = VideoConfig(
        latent_height=2,
        latent_width=2,
        chunk_frames=chunk,
        window_frames=window,
        sink_frames=sink,
        horizon_frames=sum(frames for _, frames in chunks_of(chunk=chunk, chunks=chunks, first=first)),
        independent_first_frame=first == 1,
    )
    return Config(model=recipe("tiny").model, video=geometry)


def frames(text: str) -> list[set[int]]:
    """`0-2 | 0,3-8` as model_spec writes it."""
    spans = [[part.split("-") for part in chunk.split(",")] for chunk in text.split("|")]
    return [{f for span in chunk for f in range(int(span[0]), int(span[-1]) + 1)} for chunk in spans]


# ---- the plan


@settings(max_examples=400, deadline=None)
@given(
    chunk=st.integers(1, 6),
    sink=st.integers(0, 6),
    spare=st.one_of(st.none(), st.integers(0, 14)),
    chunks=st.integers(1, 13),
    first=st.sampled_from([None, 1]),
)
def test_attends_to_what_the_reference_attends_to(chunk, sink, spare, chunks, first):
    window = None if spare is None else sink + chunk + spare
    sizes = {
        "chunk": chunk,
        "window": window,
        "sink": sink,
        "chunks": chunks,
        "first": first if chunk > 1 and chunks > 1 else None,
    }
    plan = slots_from_config(video(**sizes))
    assert list(plan_windows(plan, chunks)) == list(reference_windows(**sizes))


@pytest.mark.parametrize(("window", "sink"), [(None, 4), (None, 100), (20, 5), (9, 6)])
def test_a_sink_longer_than_the_history(window, sink):
    # The window is then never full, so the reference rolls nothing; no commit may go past the last slot.
    sizes = {"chunk": 3, "window": window, "sink": sink, "chunks": 2}
    plan = slots_from_config(video(**sizes))
    assert list(plan_windows(plan, 2)) == list(reference_windows(**sizes))


@pytest.mark.parametrize(
    ("window", "sink", "held"),
    [  # model_spec section 7b, and section 5 for the last
        (9, 3, "0-2 | 0-5 | 0-8 | 0-2,6-11 | 0-2,9-14 | 0-2,12-17"),
        (8, 2, "0-2 | 0-5 | 0,1,3-8 | 0,1,6-11 | 0,1,9-14 | 0,1,12-17 | 0,1,15-20"),
        (7, 1, "0-2 | 0-5 | 0,3-8 | 0,6-11 | 0,9-14 | 0,12-17"),
    ],
)
def test_recorded_rolling_layouts(window, sink, held):
    expected = frames(held)
    sizes = {"chunk": 3, "window": window, "sink": sink, "chunks": len(expected)}
    by_chunk = dict(plan_windows(slots_from_config(video(**sizes)), len(expected)))
    assert [by_chunk[c] for c in range(len(expected))] == expected
    assert dict(reference_windows(**sizes)) == by_chunk


@pytest.mark.parametrize(
    ("window", "sink", "held"),
    [  # model_spec section 7b: the first eviction is one frame
        (9, 3, "0 | 0-3 | 0-6 | 0-2,4-9 | 0-2,7-12 | 0-2,10-15"),
        (7, 1, "0 | 0-3 | 0-6 | 0,4-9 | 0,7-12 | 0,10-15"),
        (None, 0, "0 | 0-3 | 0-6 | 0-9"),
    ],
)
def test_rolling_layouts_after_a_first_chunk_of_one_frame(window, sink, held):
    expected = frames(held)
    sizes = {"chunk": 3, "window": window, "sink": sink, "chunks": len(expected), "first": 1}
    by_chunk = dict(plan_windows(slots_from_config(video(**sizes)), len(expected)))
    assert [by_chunk[c] for c in range(len(expected))] == expected
    assert dict(reference_windows(**sizes)) == by_chunk


def test_history_that_a_chunk_may_find():
    """Whole chunks; after a first chunk of one frame one more, or whole chunks again once a flush has dropped it."""
    assert history_lengths(video(chunk=3, window=7, sink=1, chunks=4)) == [0, 3, 6, 9]
    assert history_lengths(video(chunk=3, window=7, sink=1, chunks=4, first=1)) == [0, 1, 3, 4, 6, 7]
    assert history_lengths(video(chunk=1, window=None, sink=0, chunks=3)) == [0, 1, 2]


@settings(max_examples=100, deadline=None)
@given(chunk=st.integers(1, 6), sink=st.integers(0, 6), ring=st.integers(0, 300), number=st.integers(0, 1000))
def test_a_commit_moves_at_most_one_chunk_whatever_the_window(chunk, sink, ring, number):
    plan = SlotPlan(capacity_frames=chunk + sink + ring, step_frames=(chunk,), sink_frames=sink)
    moves = list(plan.commits(number * chunk))
    assert len(moves) <= chunk
    assert len({slot for _, slot in moves}) == len(moves)
    assert all(chunk <= slot < plan.capacity_frames for _, slot in moves)


# ---- the memory

T = 6  # tokens of a frame of `tiny`


def make_slots(world_size: int = 1) -> KVSlots:
    config = override(recipe("tiny"), {"build.world_size": str(world_size)})
    assert config.tokens_per_frame == T
    return KVSlots(config, layout_from_config(config), torch.float32)


def stage(slots: KVSlots, first_frame: int) -> None:
    """Write into staging what an executor would: every value tells frame, token, layer, shard, and whether k or v."""
    for layer, pairs in enumerate(slots.filled(first_frame)):
        for shard, pair in enumerate(pairs):
            for which, tensor in enumerate(pair):
                tensor[:, : 3 * T] = content(range(first_frame, first_frame + 3), layer, shard, which)[:, None]


def content(frame_numbers, layer, shard, which):
    rows = torch.tensor([frame * T + token for frame in frame_numbers for token in range(T)])
    return ((rows * 10 + layer) * 10 + shard) * 10.0 + which


@pytest.mark.parametrize("world_size", [1, 2])
def test_kv_slots_hold_the_frames_of_the_plan(world_size):
    slots = make_slots(world_size)
    expected = frames("0-2 | 0-5 | 0,3-8 | 0,6-11")
    for chunk, held in enumerate(expected):
        stage(slots, 3 * chunk)
        for layer, pairs in enumerate(slots.filled(3 * chunk)):
            for shard, pair in enumerate(pairs):
                for which, tensor in enumerate(pair):
                    assert tensor.shape[1] == len(held) * T
                    rows = tensor[0].sort(dim=0).values
                    wanted = content(sorted(held), layer, shard, which)
                    torch.testing.assert_close(rows, wanted[:, None].expand_as(rows), rtol=0, atol=0)
        slots.commit(3 * chunk)


def test_commit_copies_the_clean_rows_and_leaves_staging_alone():
    slots = make_slots()
    stage(slots, 0)
    staged = slots.filled(0)[1][0][1].clone()
    slots.commit(0)
    _, v = slots.filled(3)[1][0]
    assert torch.equal(v[:, : 3 * T], staged)
    assert torch.equal(v[:, 3 * T : 6 * T], staged), "sink frame 0, then ring frames 1 and 2"
    stage(slots, 3)
    assert torch.equal(v[:, 3 * T :], staged), "staging of the next chunk touches no history"


PLANS = [
    {"chunk": 3, "window": None, "sink": 0},
    {"chunk": 3, "window": 7, "sink": 1},
    {"chunk": 3, "window": 9, "sink": 3},
    {"chunk": 3, "window": 8, "sink": 2, "first": 1},
    {"chunk": 2, "window": 9, "sink": 3, "first": 1},
    {"chunk": 1, "window": 4, "sink": 1},
    {"chunk": 4, "window": 6, "sink": 0},
]


def random_slots(config: Config, *, whole_slots: bool) -> KVSlots:
    slots = KVSlots(config, layout_from_config(config), torch.bfloat16, whole_slots=whole_slots)
    for tensor in all_tensors(slots):
        tensor.copy_(torch.randn(tensor.shape))
    return slots


def all_tensors(slots: KVSlots) -> list[torch.Tensor]:
    """Keys and values as they are held, to the last row."""
    return [tensor for layer in slots._pairs for pair in layer for tensor in pair]


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: "-".join(f"{key}{value}" for key, value in plan.items()))
@pytest.mark.parametrize("whole_slots", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_commit_is_to_the_bit_what_copying_frame_by_frame_gives(plan, whole_slots, world_size):
    config = override(video(**plan, chunks=7), {"build.world_size": str(world_size)})
    slots, rows = random_slots(config, whole_slots=whole_slots), config.tokens_per_frame
    expected = [tensor.clone() for tensor in all_tensors(slots)]
    for first_frame, _ in chunks_of(chunk=plan["chunk"], chunks=7, first=plan.get("first")):
        step = config.video.step_at(first_frame)
        for tensor, copy in zip(all_tensors(slots), expected, strict=True):
            staged = torch.randn(tensor[..., : plan["chunk"] * rows, :].shape).to(tensor.dtype)
            tensor[..., : plan["chunk"] * rows, :] = copy[..., : plan["chunk"] * rows, :] = staged
        for source, target in slots.plan.commits(first_frame, step=step):
            for copy in expected:
                copy[..., target * rows : (target + 1) * rows, :] = copy[..., source * rows : (source + 1) * rows, :]
        slots.commit(first_frame, step=step)
        assert all(torch.equal(*pair) for pair in zip(all_tensors(slots), expected, strict=True))


class Operators(TorchDispatchMode):
    """The operators that torch is called with, and their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("whole_slots", [False, True])
def test_a_commit_is_one_operator_whatever_the_layers(whole_slots):
    """Of contiguous views: for others, CUDA's `_foreach_copy_` would launch a kernel for each."""
    config = override(recipe("tiny"), {"model.num_layers": "30", "build.world_size": "2"})
    slots = random_slots(config, whole_slots=whole_slots)
    with Operators() as operators:
        slots.commit(3)
    ((operator, (targets, sources)),) = operators.calls
    assert operator is torch.ops.aten._foreach_copy_.default
    assert len(targets) >= 3 * 30 * 2
    assert all(view.is_contiguous() for view in (*targets, *sources))


def test_rows_moved_counts_rows_of_time_not_of_layers():
    slots = make_slots()
    moved = []
    for chunk in range(4):
        slots.commit(3 * chunk)
        moved.append(slots.rows_moved)
    assert moved == [3 * T, 6 * T, 9 * T, 12 * T]


def test_nothing_moves_without_history_slots():
    config = override(recipe("tiny"), {"video.window_frames": "3", "video.sink_frames": "0"})
    slots = KVSlots(config, layout_from_config(config), torch.float32)
    for chunk in range(4):
        slots.commit(3 * chunk)
        assert slots.filled(3 * chunk)[0][0][0].shape[1] == 3 * T
    assert slots.rows_moved == 0


def test_filled_is_a_view():
    slots = make_slots(2)
    whole = slots.filled(9)
    for first_frame, valid in ((0, 3), (3, 6), (6, 7), (9, 7)):
        for layer, pairs in enumerate(slots.filled(first_frame)):
            for shard, pair in enumerate(pairs):
                for which, tensor in enumerate(pair):
                    assert tensor.data_ptr() == whole[layer][shard][which].data_ptr()
                    assert tensor.is_contiguous()
                    assert tensor.shape[1] == valid * T


def test_no_two_tensors_share_memory():
    pointers = [t.data_ptr() for layer in make_slots(2).filled(0) for pair in layer for t in pair]
    assert len(pointers) == len(set(pointers)) == 2 * 2 * 2


def test_slots_bound_whole_hold_no_leftovers(monkeypatch):
    # Rows that are not filled are masked, but a mask multiplies by zero, and zero times a NaN left in memory is NaN.
    config = override(recipe("tiny"), {"build.world_size": "2"})
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: torch.full(shape, torch.nan, **options))
    slots = KVSlots(config, layout_from_config(config), torch.bfloat16, whole_slots=True)
    for layer in slots.filled(0):
        for shard, pair in zip(layout_from_config(config).shards, layer, strict=True):
            for tensor in pair:
                assert tensor.shape == (1, shard.num_heads, config.slot_rows, config.model.head_dim)
                assert not tensor.any()
