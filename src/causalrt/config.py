"""Configuration: what is computed (model), of what shape (video), how it is sampled, and how it is compiled.

Four frozen dataclasses, gathered in `Config`; a recipe is a function that returns a complete `Config`. Every field can be
overridden by its dotted name (`override(config, {"model.num_layers": "2"})`), which is what the command line's `--set` does.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from causalrt.codec_geometry import WAN21, CodecGeometry
from causalrt.errors import ConfigError, Faults
from causalrt.plain import from_plain, type_name

Precision = Literal["float32", "bfloat16", "float16"]
HeadPlanName = Literal["balanced", "padded", "grouped"]
TimeIndex = Literal["global", "relative"]

MAX_LATENT_FRAMES = 1024
"""Positions that the rotary table of the reference has (model_spec section 4)."""
LARGEST_LATENTS = {"latent_height": 270, "latent_width": 480}
"""The size of a 4K picture in latents; larger values are most likely pixels."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Sizes of the causal Wan transformer (model_spec sections 1 to 6)."""

    dim: int
    num_heads: int
    num_layers: int
    ffn_dim: int
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    latent_channels: int = 16
    patch_height: int = 2
    patch_width: int = 2
    eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in (f.name for f in dataclasses.fields(self)):
            _require(
                0 < getattr(self, name) < math.inf,
                f"model.{name} must be positive and finite, got {getattr(self, name)}",
            )
        _require(
            self.dim % self.num_heads == 0,
            f"model.dim must be a multiple of model.num_heads, got dim={self.dim} and num_heads={self.num_heads}",
        )
        _require(
            self.head_dim % 2 == 0,
            f"model.dim / model.num_heads must be even (rotary pairs), got {self.head_dim}",
        )
        _require(self.freq_dim % 2 == 0, f"model.freq_dim must be even (cos and sin halves), got {self.freq_dim}")

    @property
    def head_dim(self) -> int:
        """Number of channels of one attention head."""
        return self.dim // self.num_heads

    @property
    def patch_features(self) -> int:
        """Number of features of one token: latent_channels x patch_height x patch_width (64 for Wan)."""
        return self.latent_channels * self.patch_height * self.patch_width


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoConfig:
    """Geometry of the video and of its attention window, in latent frames and latent rows.

    `window_frames` counts the current chunk, the sink and the rolled history (the reference's `local_attn_size`); None is
    full attention, whose window is the whole horizon.

    With `independent_first_frame` the first chunk of a video has one latent frame, as image to video wants it, and all other
    chunks have `chunk_frames` (model_spec section 7b). The horizon is then one frame and a whole number of chunks.

    `time_index` is what rotary angles count time by. `global`: the frame's number, and keys are kept rotated; no rollout
    is longer than the horizon. `relative`: the distance to the current chunk, and keys are rotated whenever they are read,
    which the fused ops do (`model/wan/relative_rope.py`); a rollout may go on beyond the horizon, which then is its length by
    default, the longest window, and the greatest distance at which a sink is seen.
    """

    latent_height: int
    latent_width: int
    chunk_frames: int = 3
    window_frames: int | None = None
    sink_frames: int = 0
    horizon_frames: int = 21
    time_index: TimeIndex = "global"
    independent_first_frame: bool = False

    def __post_init__(self) -> None:
        for name in ("latent_height", "latent_width", "chunk_frames", "horizon_frames"):
            _require(getattr(self, name) > 0, f"video.{name} must be positive, got {getattr(self, name)}")
        _require(self.sink_frames >= 0, f"video.sink_frames must not be negative, got {self.sink_frames}")
        _require(
            self.horizon_frames <= MAX_LATENT_FRAMES,
            f"video.horizon_frames is {self.horizon_frames}, but the model has {MAX_LATENT_FRAMES} temporal positions",
        )
        self._check_horizon()
        _require(
            self.time_index in get_args(TimeIndex),
            f"video.time_index must be one of {', '.join(get_args(TimeIndex))}, got {self.time_index!r}",
        )
        if self.window_frames is not None:
            least = self.sink_frames + self.chunk_frames
            _require(
                self.window_frames >= least,
                f"video.window_frames is {self.window_frames}, but the sink ({self.sink_frames}) and one chunk "
                f"({self.chunk_frames}) need {least}; the reference would overwrite its sink without a word",
            )

    def _check_horizon(self) -> None:
        horizon, chunk = self.horizon_frames, self.chunk_frames
        if not self.independent_first_frame:
            _require(
                horizon % chunk == 0,
                f"video.horizon_frames ({horizon}) must be a multiple of video.chunk_frames ({chunk})",
            )
            return
        chunks = max(1, (horizon - 1) // chunk)
        _require(
            horizon > 1 and (horizon - 1) % chunk == 0,
            f"video.horizon_frames ({horizon}) must be one frame and whole chunks of video.chunk_frames ({chunk}), for "
            f"video.independent_first_frame is true: {1 + chunks * chunk} or {1 + (chunks + 1) * chunk}, say",
        )

    @property
    def step_frames(self) -> tuple[int, ...]:
        """Latent frames of each kind of step, which has graphs of its own: `(3,)`, or `(3, 1)` with a first chunk of one frame.

        A step's number is an index into this tuple. Step 0 makes all chunks except, possibly, the first.
        """
        shorter_first = self.independent_first_frame and self.chunk_frames > 1
        return (self.chunk_frames, 1) if shorter_first else (self.chunk_frames,)

    def step_at(self, first_frame: int) -> int:
        """Number of the step that makes the chunk at `first_frame` of the video."""
        return 0 if first_frame else len(self.step_frames) - 1

    def frames_at(self, first_frame: int) -> int:
        """Frames of the chunk at `first_frame` of the video."""
        return self.step_frames[self.step_at(first_frame)]

    @property
    def horizon_chunks(self) -> int:
        """Chunks of a video that is as long as the horizon."""
        return self.chunks_in(self.horizon_frames)

    def chunks_in(self, frames: int) -> int:
        """Whole chunks in the first `frames` latent frames of a video."""
        after_first = frames - self.frames_at(0)
        return 1 + after_first // self.chunk_frames if after_first >= 0 else 0

    def first_frame_of(self, chunk: int) -> int:
        """Latent frame of the video at which a chunk begins."""
        return self.frames_at(0) + (chunk - 1) * self.chunk_frames if chunk else 0

    def frames_of_chunks(self, num_chunks: int, *, first_chunk: int = 0) -> list[int]:
        """Latent frames of each of `num_chunks` consecutive chunks, the first of which is number `first_chunk` of the video."""
        return [self.frames_at(self.first_frame_of(first_chunk + index)) for index in range(num_chunks)]

    @property
    def codec(self) -> CodecGeometry:
        """Scales and frame rate of the codec whose latents the video consists of."""
        return WAN21

    @property
    def pixel_height(self) -> int:
        """Rows of a decoded frame."""
        return self.codec.pixels_per_latent * self.latent_height

    @property
    def pixel_width(self) -> int:
        """Columns of a decoded frame."""
        return self.codec.pixels_per_latent * self.latent_width

    @property
    def fps(self) -> int:
        """Frame rate of the model's videos, in decoded frames per second."""
        return self.codec.fps

    @property
    def capacity_frames(self) -> int:
        """W: latent frames whose keys and values are held, the current chunk included."""
        return self.horizon_frames if self.window_frames is None else min(self.window_frames, self.horizon_frames)


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerConfig:
    """Few-step schedule (model_spec section 7)."""

    steps: tuple[int, ...] = (1000, 750, 500, 250)
    shift: float = 5.0
    warp: bool = True
    context_timestep: float = 0.0

    def __post_init__(self) -> None:
        _require(len(self.steps) > 0, "sampler.steps must name at least one timestep, for example 1000,750,500,250")
        _require(
            all(0 <= s <= 1000 for s in self.steps),
            f"sampler.steps must lie in [0, 1000], got {list(self.steps)}",
        )
        _require(
            all(a >= b for a, b in zip(self.steps, self.steps[1:], strict=False)),
            f"sampler.steps must not rise: they go from noise to clean, got {list(self.steps)}",
        )
        _require(0 < self.shift < math.inf, f"sampler.shift must be positive and finite, got {self.shift}")
        _require(
            0 <= self.context_timestep <= 1000,
            f"sampler.context_timestep must lie in [0, 1000], got {self.context_timestep}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildConfig:
    """How the step is compiled: number of ranks, division of heads among them, and precision of weights and activations."""

    world_size: int = 1
    head_plan: HeadPlanName = "balanced"
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        _require(self.world_size >= 1, f"build.world_size must be at least 1, got {self.world_size}")
        for name, choices in (("head_plan", get_args(HeadPlanName)), ("precision", get_args(Precision))):
            value = getattr(self, name)
            _require(value in choices, f"build.{name} must be one of {', '.join(choices)}, got {value!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Everything that a bundle is built from, and that its manifest records."""

    model: ModelConfig
    video: VideoConfig
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    build: BuildConfig = field(default_factory=BuildConfig)

    def __post_init__(self) -> None:
        for axis in ("height", "width"):
            latent, patch = getattr(self.video, f"latent_{axis}"), getattr(self.model, f"patch_{axis}")
            _require(
                latent % patch == 0,
                f"video.latent_{axis} must be a multiple of the patch ({patch}), got {latent}: "
                f"the last {'row' if axis == 'height' else 'column'} would be lost",
            )

    @property
    def tokens_per_frame(self) -> int:
        """T: tokens of one latent frame."""
        return self.grid_height * self.grid_width

    @property
    def grid_height(self) -> int:
        """Token rows of one latent frame."""
        return self.video.latent_height // self.model.patch_height

    @property
    def grid_width(self) -> int:
        """Token columns of one latent frame."""
        return self.video.latent_width // self.model.patch_width

    @property
    def tokens_per_chunk(self) -> int:
        """N = F * T: tokens of one chunk."""
        return self.video.chunk_frames * self.tokens_per_frame

    @property
    def slot_rows(self) -> int:
        """W * T: rows of a head's KV slots."""
        return self.video.capacity_frames * self.tokens_per_frame

    def as_dict(self) -> dict[str, Any]:
        """The config as plain JSON types, from which `config_from_dict` rebuilds it."""
        plain = dataclasses.asdict(self)
        plain["sampler"]["steps"] = list(self.sampler.steps)
        return plain


def config_from_dict(plain: Mapping[str, Any]) -> Config:
    """Rebuild a `Config` from `Config.as_dict()`.

    Raises:
        ConfigError: a section or field is unknown, missing, of the wrong type, or out of range.
    """
    sections = get_type_hints(Config)
    if not isinstance(plain, Mapping) or set(plain) != set(sections):
        got = sorted(map(str, plain)) if isinstance(plain, Mapping) else repr(plain)
        raise ConfigError(f"a config has the sections {sorted(sections)}, got {got}")
    built = {}
    for name, cls in sections.items():
        values = plain[name]
        if not isinstance(values, Mapping):
            raise ConfigError(f"config section {name} must map fields to values, got {values!r}")
        fields = {field.name for field in dataclasses.fields(cls)}
        unknown, missing = set(values) - fields, fields - set(values)
        if unknown or missing:
            raise ConfigError(
                f"config section {name}: unknown fields {sorted(map(str, unknown))}, missing {sorted(missing)}"
            )
        try:
            built[name] = from_plain(cls, dict(values), name)
        except TypeError as error:
            raise ConfigError(str(error)) from None
    return Config(**built)


def override(config: Config, changes: Mapping[str, str]) -> Config:
    """Copy a config with fields replaced by dotted name; all changes take effect together.

    Args:
        config: the config to copy.
        changes: text by dotted name, for example `{"video.window_frames": "9", "sampler.steps": "1000,500"}`; `none` stands
            for None.

    Raises:
        ConfigError: unknown name (the known ones are listed), text that is not of the field's type, a size in latents that was
            most likely meant in pixels, or a bad combination. One error lists all faults.
    """
    sections: dict[str, dict[str, Any]] = {}
    faults = Faults()
    hints = {f"{s}.{f}": hint for s, cls in get_type_hints(Config).items() for f, hint in get_type_hints(cls).items()}
    for name, text in changes.items():
        with faults:
            if name not in hints:
                raise ConfigError(f"no field {name!r}; the fields are: {', '.join(sorted(hints))}")
            section, key = name.split(".")
            sections.setdefault(section, {})[key] = value = _parse(name, hints[name], text)
            if key in LARGEST_LATENTS and value > LARGEST_LATENTS[key]:
                raise ConfigError(
                    f"{name} counts latents of {WAN21.pixels_per_latent} pixels, so {value} of them are "
                    f"{WAN21.pixels_per_latent * value} pixels, which is beyond 4K; for {value} pixels give "
                    f"`--set {name}={round(value / WAN21.pixels_per_latent)}`"
                )
    replaced = {}
    for section, values in sections.items():
        with faults:
            replaced[section] = dataclasses.replace(getattr(config, section), **values)
    faults.report()
    return dataclasses.replace(config, **replaced)


def _parse(name: str, hint: Any, text: str) -> Any:
    if type(None) in get_args(hint):
        if text.lower() == "none":
            return None
        hint = next(t for t in get_args(hint) if t is not type(None))
    try:
        if hint is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        if get_origin(hint) is tuple:
            return tuple(int(part) for part in text.split(","))
        if hint in (int, float):
            return hint(text)
    except (ValueError, KeyError):
        raise ConfigError(f"{name} must be {type_name(hint)}, got {text!r}") from None
    return text
