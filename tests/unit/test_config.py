import dataclasses
import json
import re
from typing import get_type_hints

import pytest

from causalrt.config import (
    MAX_LATENT_FRAMES,
    BuildConfig,
    Config,
    ModelConfig,
    SamplerConfig,
    VideoConfig,
    config_from_dict,
    override,
)
from causalrt.errors import CausalRTError, ConfigError
from causalrt.recipes import RECIPES, recipe

TINY = recipe("tiny")
FIELDS = {f"{name}.{field.name}" for name, cls in get_type_hints(Config).items() for field in dataclasses.fields(cls)}

# One change of each field that is valid by itself on top of `tiny`: text given, value that must arrive.
CHANGES = {
    "model.dim": ("96", 96),
    "model.num_heads": ("4", 4),
    "model.num_layers": ("3", 3),
    "model.ffn_dim": ("97", 97),
    "model.freq_dim": ("34", 34),
    "model.text_dim": ("25", 25),
    "model.text_len": ("9", 9),
    "model.latent_channels": ("4", 4),
    "model.patch_height": ("4", 4),
    "model.patch_width": ("3", 3),
    "model.eps": ("1e-5", 1e-5),
    "video.latent_height": ("8", 8),
    "video.latent_width": ("10", 10),
    "video.chunk_frames": ("4", 4),
    "video.window_frames": ("none", None),
    "video.sink_frames": ("2", 2),
    "video.horizon_frames": ("15", 15),
    "video.time_index": ("relative", "relative"),
    "video.independent_first_frame": ("true", True),
    "sampler.steps": ("1000, 500", (1000, 500)),
    "sampler.shift": ("8", 8.0),
    "sampler.warp": ("false", False),
    "sampler.context_timestep": ("100", 100.0),
    "build.world_size": ("8", 8),
    "build.head_plan": ("grouped", "grouped"),
    "build.precision": ("bfloat16", "bfloat16"),
}

# What a change is put on top of, where that is not `tiny`: with and without this one, one horizon has to do.
BASES = {"video.independent_first_frame": override(TINY, {"video.chunk_frames": "1"})}

# Field changed on top of `tiny`, its text, and what the message must name.
REFUSED = [
    *((name, "0", (name, "0")) for name in sorted(FIELDS) if name.startswith("model.")),
    ("model.dim", "50", ("model.dim", "50", "model.num_heads", "3")),
    ("model.num_heads", "16", ("model.num_heads", "even", "got 3")),
    ("model.dim", "51", ("model.dim", "even", "got 17")),
    ("model.freq_dim", "33", ("model.freq_dim", "33")),
    ("model.eps", "nan", ("model.eps", "nan")),
    ("model.eps", "-1e-6", ("model.eps", "-1e-06")),
    ("model.dim", "4.5", ("model.dim", "int", "'4.5'")),
    ("model.dim", "", ("model.dim", "int", "''")),
    ("model.dim", "none", ("model.dim", "int", "'none'")),
    ("model.dim", "9" * 5000, ("model.dim", "int")),
    ("model.eps", "small", ("model.eps", "float", "'small'")),
    ("model.patch_height", "3", ("video.latent_height", "3", "4")),
    ("video.latent_height", "5", ("video.latent_height", "5", "(2)", "row")),
    ("video.latent_width", "7", ("video.latent_width", "7", "(2)", "column")),
    ("video.latent_height", "-2", ("video.latent_height", "-2")),
    ("video.chunk_frames", "0", ("video.chunk_frames", "0")),
    ("video.chunk_frames", "5", ("video.horizon_frames", "video.chunk_frames", "12", "5")),
    ("video.chunk_frames", "12", ("video.window_frames", "7", "12", "13")),
    ("video.window_frames", "3", ("video.window_frames", "3", "4")),
    ("video.window_frames", "all", ("video.window_frames", "'all'")),
    ("video.sink_frames", "-1", ("video.sink_frames", "-1")),
    ("video.sink_frames", "5", ("video.window_frames", "7", "8")),
    ("video.horizon_frames", "0", ("video.horizon_frames", "0")),
    ("video.horizon_frames", "13", ("video.horizon_frames", "13")),
    ("video.horizon_frames", "1026", ("video.horizon_frames", "1026", str(MAX_LATENT_FRAMES))),
    ("video.independent_first_frame", "true", ("video.horizon_frames (12)", "independent_first_frame", "10 or 13")),
    ("video.independent_first_frame", "maybe", ("video.independent_first_frame", "bool", "'maybe'")),
    ("video.time_index", "absolute", ("video.time_index", "'absolute'", "global", "relative")),
    ("video.time_index", "none", ("video.time_index", "'none'")),
    ("sampler.steps", "", ("sampler.steps", "integers", "''")),
    ("sampler.steps", "1000,,250", ("sampler.steps", "'1000,,250'")),
    ("sampler.steps", "1001,500", ("sampler.steps", "1001")),
    ("sampler.steps", "500,-1", ("sampler.steps", "-1")),
    ("sampler.steps", "500,750", ("sampler.steps", "[500, 750]")),
    ("sampler.steps", "500,501", ("sampler.steps", "[500, 501]")),
    ("sampler.shift", "0", ("sampler.shift", "0")),
    ("sampler.shift", "nan", ("sampler.shift", "nan")),
    ("sampler.warp", "maybe", ("sampler.warp", "bool", "'maybe'")),
    ("sampler.context_timestep", "-1", ("sampler.context_timestep", "-1")),
    ("sampler.context_timestep", "nan", ("sampler.context_timestep", "nan")),
    ("sampler.context_timestep", "inf", ("sampler.context_timestep", "inf")),
    ("build.world_size", "0", ("build.world_size", "0")),
    ("build.head_plan", "ring", ("build.head_plan", "'ring'", "balanced", "padded", "grouped")),
    ("build.precision", "fp8", ("build.precision", "'fp8'", "float32", "bfloat16", "float16")),
]


def edited(path: str, value: object) -> dict:
    """`tiny` as plain JSON with one entry replaced; `section` alone replaces the whole section."""
    plain = json.loads(json.dumps(TINY.as_dict()))
    *section, key = path.split(".")
    (plain[section[0]] if section else plain)[key] = value
    return plain


# ---- recipes


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_complete_and_survives_json(name):
    config = recipe(name)
    again = config_from_dict(json.loads(json.dumps(config.as_dict())))
    assert again == config
    assert hash(again) == hash(config)
    assert type(again.sampler.steps) is tuple


@pytest.mark.parametrize(("name", "num_heads"), [("wan_1_3b_480p", 12), ("wan_14b_480p", 40)])
def test_released_sizes(name, num_heads):
    config = recipe(name)
    assert (config.model.num_heads, config.model.head_dim, config.tokens_per_chunk) == (num_heads, 128, 4680)
    assert config.model.patch_features == 64
    assert config.video.capacity_frames == 21


def test_unknown_recipe_lists_the_known_ones():
    with pytest.raises(ConfigError, match="'wan'") as caught:
        recipe("wan")
    assert all(name in str(caught.value) for name in RECIPES)


def test_config_error_is_typed():
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigError, CausalRTError)


# ---- derived values


def test_grid_and_tokens():
    assert (TINY.grid_height, TINY.grid_width, TINY.tokens_per_frame, TINY.tokens_per_chunk) == (2, 3, 6, 18)


@pytest.mark.parametrize(("window", "horizon", "capacity"), [(None, 12, 12), (7, 12, 7), (12, 12, 12), (30, 12, 12)])
def test_capacity_is_the_window_within_the_horizon(window, horizon, capacity):
    video = VideoConfig(latent_height=2, latent_width=2, window_frames=window, horizon_frames=horizon)
    assert video.capacity_frames == capacity


def with_first_frame(*, chunk: int = 3, horizon: int) -> VideoConfig:
    geometry = {"latent_height": 2, "latent_width": 2, "chunk_frames": chunk, "horizon_frames": horizon}
    return VideoConfig(**geometry, independent_first_frame=True)


def test_an_independent_first_frame_and_whole_chunks():
    video = with_first_frame(horizon=10)
    assert video.step_frames == (3, 1)
    assert [video.step_at(frame) for frame in (0, 1, 4, 7)] == [1, 0, 0, 0]
    assert [video.first_frame_of(chunk) for chunk in range(4)] == [0, 1, 4, 7]
    assert [video.chunks_in(frames) for frames in (0, 1, 3, 4, 10)] == [0, 1, 1, 2, 4]
    assert [video.frames_at(frame) for frame in (0, 1, 4, 7)] == [1, 3, 3, 3]
    assert (video.frames_of_chunks(4), video.frames_of_chunks(2, first_chunk=1)) == ([1, 3, 3, 3], [3, 3])
    assert (video.horizon_chunks, video.capacity_frames) == (4, 10)


def test_where_chunks_have_one_frame_there_is_one_kind_of_step():
    video = with_first_frame(chunk=1, horizon=5)
    assert (video.step_frames, video.frames_at(0), video.horizon_chunks) == ((1,), 1, 5)


def test_without_the_flag_there_is_one_kind_of_step():
    video = recipe("tiny").video
    assert (video.step_frames, video.frames_at(0), video.horizon_chunks) == ((3,), 3, 4)
    assert [video.chunks_in(frames) for frames in (0, 2, 3, 12)] == [0, 0, 1, 4]


@pytest.mark.parametrize(("horizon", "said"), [(1, "4 or 7"), (3, "4 or 7"), (12, "10 or 13"), (21, "19 or 22")])
def test_horizons_that_an_independent_first_frame_does_not_fit(horizon, said):
    with pytest.raises(ConfigError, match=rf"horizon_frames \({horizon}\) .* {said}, say"):
        with_first_frame(horizon=horizon)


# ---- override


def test_every_field_has_a_change():
    assert set(CHANGES) == FIELDS


@pytest.mark.parametrize("name", sorted(CHANGES))
def test_override_replaces_that_field_alone(name):
    text, value = CHANGES[name]
    base = BASES.get(name, TINY)
    changed = override(base, {name: text})
    section, key = name.split(".")
    got = getattr(getattr(changed, section), key)
    assert got == value
    assert type(got) is type(value)
    assert got != getattr(getattr(base, section), key), "the change must show"
    before, after = base.as_dict(), changed.as_dict()
    before[section].pop(key), after[section].pop(key)
    assert after == before


def test_override_applies_all_changes_at_once():
    # Each of these alone is refused: 48 is no multiple of 5 heads, 15 is no multiple of 5 frames, and so on.
    changed = override(
        TINY,
        {"model.num_heads": "5", "model.dim": "80", "video.chunk_frames": "5", "video.horizon_frames": "15"}
        | {"model.patch_height": "3", "video.latent_height": "9"},
    )
    assert (changed.model.head_dim, changed.tokens_per_chunk) == (16, 45)
    assert override(TINY, {}) == TINY


@pytest.mark.parametrize("text", ["true", "True", "1", "yes", "YES"])
def test_override_reads_booleans(text):
    off = override(TINY, {"sampler.warp": "no"})
    assert override(off, {"sampler.warp": text}) == TINY


@pytest.mark.parametrize("text", ["none", "None", "NONE"])
def test_override_reads_none(text):
    assert override(TINY, {"video.window_frames": text}).video.window_frames is None


@pytest.mark.parametrize("name", ["", "model", "dim", "model.", "model.depth", "model.head_dim", "model.dim.x"])
def test_override_lists_the_fields_for_an_unknown_name(name):
    with pytest.raises(ConfigError, match=re.escape(repr(name))) as caught:
        override(TINY, {name: "1"})
    assert all(field in str(caught.value) for field in FIELDS)


@pytest.mark.parametrize(("name", "text", "named"), REFUSED, ids=[f"{n}={t[:12]}" for n, t, _ in REFUSED])
def test_override_refuses_and_names_field_and_value(name, text, named):
    with pytest.raises(ConfigError) as caught:
        override(TINY, {name: text})
    for part in named:
        assert part in str(caught.value)


@pytest.mark.parametrize("name", ["sampler.shift", "model.eps"])
def test_override_refuses_infinity(name):
    with pytest.raises(ConfigError, match=name):
        override(TINY, {name: "inf"})


def test_constructors_check_too():
    with pytest.raises(ConfigError, match=r"model\.dim"):
        ModelConfig(dim=0, num_heads=1, num_layers=1, ffn_dim=1)
    with pytest.raises(ConfigError, match=r"sampler\.steps"):
        SamplerConfig(steps=())
    with pytest.raises(ConfigError, match=r"build\.head_plan"):
        BuildConfig(head_plan="none")
    with pytest.raises(ConfigError, match=r"video\.latent_height"):
        Config(model=TINY.model, video=VideoConfig(latent_height=3, latent_width=2))


@pytest.mark.parametrize("section", ["model", "video", "sampler", "build"])
def test_sections_are_frozen(section):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(getattr(TINY, section), dataclasses.fields(getattr(TINY, section))[0].name, 1)


# ---- config_from_dict


@pytest.mark.parametrize("name", sorted(CHANGES))
def test_round_trip_keeps_every_field(name):
    changed = override(BASES.get(name, TINY), {name: CHANGES[name][0]})
    assert config_from_dict(json.loads(json.dumps(changed.as_dict()))) == changed


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model.dim", True),
        ("model.dim", 48.0),
        ("model.dim", "48"),
        ("model.dim", None),
        ("model.dim", [48]),
        ("model.dim", -48),
        ("model.eps", True),
        ("model.eps", "1e-6"),
        ("model.eps", None),
        ("model.eps", float("nan")),
        ("video.window_frames", "7"),
        ("video.window_frames", 7.0),
        ("video.window_frames", False),
        ("video.sink_frames", None),
        ("video.time_index", None),
        ("video.time_index", "local"),
        ("sampler.steps", "1000"),
        ("sampler.steps", []),
        ("sampler.steps", [1000, 500.0]),
        ("sampler.steps", [True]),
        ("sampler.steps", [[1000]]),
        ("sampler.steps", {"1000": 1}),
        ("sampler.warp", 1),
        ("sampler.warp", "true"),
        ("build.head_plan", ["balanced"]),
        ("build.head_plan", {}),
        ("build.precision", None),
        ("build.world_size", 1.0),
    ],
)
def test_config_from_dict_refuses_a_wrong_value(path, value):
    with pytest.raises(ConfigError, match=re.escape(path)):
        config_from_dict(edited(path, value))


@pytest.mark.parametrize("section", ["model", "video", "sampler", "build"])
def test_config_from_dict_refuses_unknown_and_missing_fields(section):
    plain = TINY.as_dict()
    known = next(iter(plain[section]))
    with pytest.raises(ConfigError, match=rf"{section}.*depth"):
        config_from_dict(edited(f"{section}.depth", 3))
    plain[section].pop(known)
    with pytest.raises(ConfigError, match=rf"{section}.*{known}"):
        config_from_dict(plain)


@pytest.mark.parametrize("plain", [{}, {"model": {}}, TINY.as_dict() | {"extra": {}}, [], "model", ["model"]])
def test_config_from_dict_refuses_wrong_sections(plain):
    with pytest.raises(ConfigError, match="sections"):
        config_from_dict(plain)


@pytest.mark.parametrize(
    "plain",
    [
        None,
        7,
        *(edited("model", value) for value in (None, 3, "abc", [1, 2])),
        edited("model.eps", 10**400),
        edited("sampler.steps", 1000),
        {1: {}, "model": {}},
    ],
    ids=["none", "int", *(f"section-{i}" for i in range(4)), "huge-float", "steps-int", "mixed-keys"],
)
def test_config_from_dict_refuses_hostile_shapes(plain):
    with pytest.raises(ConfigError):
        config_from_dict(plain)
