"""Reads the weights of Wan's video VAE from local files into diffusers' module.

    folder/vae/config.json, diffusion_pytorch_model.safetensors    layout diffusers
    folder/Wan2.1_VAE.pth                                          layout wan: has no config; sizes are inferred from tensors
    vae.safetensors of a bundle                                    layout bundle: diffusers' names, config in its header
    codec.safetensors                                              the same for another codec, named in its header

The module is built on the meta device and then given its tensors; on the CPU, tensors that have the requested type stay views
of the mapped file. Nothing is downloaded, and no code in a file is run.
"""

import dataclasses
import importlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError, safe_open

from causalrt.errors import CheckpointError, ExecutorError
from causalrt.install_hint import install_extra
from causalrt.model.codecs.decode_state import CONFIG_KEY
from causalrt.model.stored_tensors import check_tensors

VaeLayout = Literal["diffusers", "wan", "bundle"]

CLASS_NAME = "AutoencoderKLWan"
WAN_FILE = "Wan2.1_VAE.pth"
DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"
_LARGEST = 4096
# fmt: off
_LATENTS_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)
_LATENTS_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)
# fmt: on


@dataclass(frozen=True, kw_only=True, slots=True)
class VaeConfig:
    """Sizes of the VAE under diffusers' names; the defaults are those of Wan2.1.

    Attributes:
        base_dim: channels at full resolution, in the encoder.
        decoder_base_dim: channels at full resolution in the decoder; None means `base_dim`.
        z_dim: number of channels of a latent.
        dim_mult: multiples of the base width at full, half, quarter and eighth resolution.
        num_res_blocks: number of residual blocks of an encoder stage; a decoder stage has one more.
        temperal_downsample: which of the three downsampling steps also halve the number of frames (spelled as in diffusers).
        latents_mean: mean of each latent channel; normalised latents have mean 0 and standard deviation 1.
        latents_std: standard deviation of each latent channel.
    """

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = _LATENTS_MEAN
    latents_std: tuple[float, ...] = _LATENTS_STD

    def __post_init__(self) -> None:
        sizes = {"base_dim": self.base_dim, "decoder_base_dim": self.decoder_dim, "z_dim": self.z_dim}
        wrong = [f"{name} {size}" for name, size in sizes.items() if not 0 < size <= _LARGEST]
        if not 0 < self.num_res_blocks <= 8:
            wrong.append(f"num_res_blocks {self.num_res_blocks}")
        if len(self.dim_mult) != 4 or not all(0 < mult <= 64 for mult in self.dim_mult):
            wrong.append(f"dim_mult {list(self.dim_mult)} (four, for the 8-fold scale)")
        if len(self.temperal_downsample) != 3 or sum(self.temperal_downsample) != 2:
            wrong.append(f"temperal_downsample {list(self.temperal_downsample)} (two of three, for the 4-fold rate)")
        for name, values in (("latents_mean", self.latents_mean), ("latents_std", self.latents_std)):
            if len(values) != self.z_dim or not all(map(math.isfinite, values)):
                wrong.append(f"{name} of {len(values)} values ({self.z_dim} finite ones, one a channel)")
        if not all(value > 0 for value in self.latents_std):
            wrong.append("latents_std that is not positive")
        if wrong:
            raise CheckpointError(f"no VAE of Wan2.1's kind has {'; '.join(wrong)}")

    @property
    def class_name(self) -> str:
        """See `CodecConfig.class_name`."""
        return CLASS_NAME

    @property
    def decoder_dim(self) -> int:
        """Number of channels at full resolution in the decoder."""
        return self.base_dim if self.decoder_base_dim is None else self.decoder_base_dim

    @classmethod
    def from_mapping(cls, plain: object) -> Self:
        """Make the config from diffusers' parsed `config.json`, or from the `config` of its module.

        Missing values default to those of Wan2.1.

        Raises:
            CheckpointError: the config is of another kind of VAE, or has an impossible value.
        """
        if not isinstance(plain, Mapping):
            raise CheckpointError(f"a VAE's config must be a JSON object, got {type(plain).__name__}")
        only = {"_class_name": CLASS_NAME, "is_residual": False, "patch_size": None, "attn_scales": []}
        only |= {"in_channels": 3, "out_channels": 3, "scale_factor_temporal": 4, "scale_factor_spatial": 8}
        wrong = [f"{key} {plain[key]!r}, wanted {want!r}" for key, want in only.items() if plain.get(key, want) != want]
        values: dict[str, Any] = {}
        for name, hint in get_type_hints(cls).items():
            if name in plain:
                value = plain[name]
                if not _is_a(value, hint):
                    wrong.append(f"{name} {value!r}, wanted {hint}")
                values[name] = tuple(value) if isinstance(value, list) else value
        if wrong:
            raise CheckpointError(f"not the VAE of Wan2.1: {'; '.join(wrong)}; take the VAE of a Wan2.1 release")
        return cls(**values)

    def to_mapping(self) -> dict[str, Any]:
        """Return the config as JSON values, which diffusers' constructor also accepts."""
        plain = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}


def _is_a(value: object, hint: Any) -> bool:
    """Return whether a parsed JSON value matches a type annotation."""
    if get_origin(hint) is tuple:
        return isinstance(value, list | tuple) and all(_is_a(entry, get_args(hint)[0]) for entry in value)
    if get_args(hint):  # a union
        return any(_is_a(value, option) for option in get_args(hint))
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint


@dataclass(frozen=True, kw_only=True, slots=True)
class VaeFiles:
    """Paths of the weights, and of the file beside them that holds the config, if there is one."""

    layout: VaeLayout
    weights: Path
    config: Path | None = None


def find_vae_files(path: Path) -> VaeFiles:
    """Find the files of a VAE; `path` is a folder of a release, a `vae/` folder, or the weight file itself.

    Raises:
        CheckpointError: there are none; every place that was searched is listed.
    """
    if path.suffix == ".pth" and path.is_file():
        return VaeFiles(layout="wan", weights=path)
    if path.suffix == ".safetensors" and path.is_file():
        config = path.parent / "config.json"
        if path.name == DIFFUSERS_FILE and config.is_file():
            return VaeFiles(layout="diffusers", weights=path, config=config)
        return VaeFiles(layout="bundle", weights=path)
    looked = []
    for place in (path / "vae", path):
        weights, config = place / DIFFUSERS_FILE, place / "config.json"
        if weights.is_file() and config.is_file():
            return VaeFiles(layout="diffusers", weights=weights, config=config)
        looked.append(f"{weights} with config.json")
    if (path / WAN_FILE).is_file():
        return VaeFiles(layout="wan", weights=path / WAN_FILE)
    raise CheckpointError(f"no VAE at {path}; looked for:\n  " + "\n  ".join([*looked, str(path / WAN_FILE)]))


def wan_vae_from_tensors(
    path: Path,
    stored: Mapping[str, torch.Tensor],
    config: VaeConfig,
    *,
    dtype: torch.dtype,
    device: str | torch.device,
) -> Any:
    """Make diffusers' module from tensors that are already mapped.

    Args:
        path: where the tensors come from, for error messages.
        stored: tensors by diffusers' names.
        config: sizes of the VAE.
        dtype: type of every parameter.
        device: device of the parameters.

    Raises:
        CheckpointError: a tensor is missing, unexpected, of a wrong shape or not finite.
        ExecutorError: diffusers is not installed.
    """
    vae = empty_vae(config)
    wanted = {name: tuple(value.shape) for name, value in vae.state_dict().items()}
    check_tensors(path, stored, wanted, fault="is not the VAE that its sizes say")
    state = {name: tensor.to(device=device, dtype=dtype) for name, tensor in stored.items()}
    wild = sorted(name for name, tensor in state.items() if not tensor.isfinite().all())
    if wild:
        raise CheckpointError(f"{path} has values that are not finite in {dtype}: {', '.join(wild)}")
    vae.load_state_dict(state, strict=True, assign=True)
    return vae.requires_grad_(False).eval()


def empty_vae(config: VaeConfig) -> Any:
    """Make a `diffusers.AutoencoderKLWan` on the meta device.

    Raises:
        ExecutorError: diffusers is not installed.
    """
    with torch.device("meta"):
        return _diffusers("diffusers").AutoencoderKLWan(**config.to_mapping()).eval()


def _diffusers(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ExecutorError(
            f"the VAE needs {module}, which cannot be imported ({error}); {install_extra('video')}"
        ) from error


def read_config(files: VaeFiles) -> object:
    """Read the config from the file beside the weights, or from their header."""
    where = files.config or files.weights
    try:
        if files.config is not None:
            return json.loads(files.config.read_text(encoding="utf-8"))
        with safe_open(files.weights, framework="pt") as file:
            return json.loads((file.metadata() or {})[CONFIG_KEY])
    except KeyError:
        raise CheckpointError(
            f"{where} has no config in its header, and none lies beside it; give the folder with both, or {WAN_FILE}"
        ) from None
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"{where} has no readable config: {error}") from None


def diffusers_from_wan(path: Path, stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Apply diffusers' own conversion; names that it does not know are kept, to be reported as unexpected."""
    convert = _diffusers("diffusers.loaders.single_file_utils").convert_wan_vae_to_diffusers
    try:
        converted: dict[str, torch.Tensor] = convert(dict(stored))
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"{path} has a tensor name that no Wan2.1 VAE has: {error}") from None
    if len(converted) != len(stored):
        raise CheckpointError(
            f"{path} has {len(stored) - len(converted)} tensors under two names; take the released file"
        )
    return converted


def config_from_tensors(path: Path, stored: Mapping[str, torch.Tensor]) -> VaeConfig:
    """Infer the config of Wan's file, which has none: widths from the tensors, all else as in Wan2.1.

    A size whose tensor is missing or is no convolution kernel defaults to Wan2.1's; the later check of all tensors reports it.
    """

    def size(name: str, dim: int, usual: int) -> int:
        kernel = stored.get(f"{name}.weight")
        return kernel.shape[dim] if kernel is not None and kernel.dim() == 5 else usual

    usual = VaeConfig()
    z_dim = size("post_quant_conv", 0, usual.z_dim)
    if z_dim != usual.z_dim:
        raise CheckpointError(
            f"{path} has latents of {z_dim} channels, and the {WAN_FILE} layout has normalisation constants for {usual.z_dim} "
            "alone; give the diffusers layout, whose config.json has them"
        )
    base_dim = size("encoder.conv_in", 0, usual.base_dim)
    decoder_dim = size("decoder.conv_out", 1, base_dim)
    return VaeConfig(base_dim=base_dim, decoder_base_dim=None if decoder_dim == base_dim else decoder_dim)
