"""Writes the streaming decoder as two ONNX graphs, with the weight file that both refer to.

    vae.safetensors   the whole VAE under diffusers' names, config in the header; `load_vae` reads it for encoding
    vae-first.onnx    latent                  -> frames, cache.*.made (except the caches that stay zero)
    vae-next.onnx     latent, cache.00 ...    -> frames, cache.00.made ...

The traced modules are in `model/codecs/wan_vae.py`, and for a cosine transform, which has no caches, in
`model/codecs/block_dct.py`. Every size is static. The weights keep their precision; latents are always float32. The decoder's
only attention is decomposed into matrix products, because its head has 384 channels and TensorRT's fused kernels support at
most 256.
"""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import onnx
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.export import ExportedProgram

from causalrt.atomic_files import atomic_file
from causalrt.config import Config
from causalrt.engines.bundle import FIRST_GRAPH, NEXT_GRAPH, VAE_WEIGHTS
from causalrt.engines.tensorrt_flavour import Flavour
from causalrt.engines.vae import FRAMES, LATENT, MADE
from causalrt.errors import BuildError, ConfigError
from causalrt.export.engine_files import run_child
from causalrt.export.engine_worker import EngineRequest, request_json
from causalrt.export.onnx import with_shared_weights
from causalrt.export.translate import onnx_from_program
from causalrt.model.codecs.decode_state import CONFIG_KEY, cache_name
from causalrt.model.codecs.registry import codec_of, vae_config_from_mapping
from causalrt.progress import Progress

STAGE = "VAE graphs"


def check_vae(vae: Any, config: Config) -> None:
    """Reject a VAE whose latents do not match the transformer's.

    Raises:
        ConfigError: the numbers of latent channels differ.
    """
    channels = vae_config_from_mapping(vae.config).z_dim
    if channels != config.model.latent_channels:
        raise ConfigError(
            f"the VAE has latents of {channels} channels, and model.latent_channels is {config.model.latent_channels}; "
            "take the VAE that the model was trained with"
        )


def write_vae(
    vae: Any, folder: Path, on_progress: Progress, *, latent_height: int, latent_width: int, graphs: bool = True
) -> None:
    """Write the VAE into a bundle's folder.

    Args:
        vae: the VAE from `load_vae`, on the CPU, in the precision that the graphs should have.
        folder: the bundle's folder.
        on_progress: called at the start and the end of each stage.
        latent_height: rows of a latent; a frame has 8 times as many.
        latent_width: columns of a latent.
        graphs: whether to write the two graphs in addition to the weights.

    Raises:
        BuildError: the weights cannot be written.
    """
    on_progress(STAGE, 0, 3)
    write_vae_weights(vae, folder / VAE_WEIGHTS)
    if not graphs:
        return
    on_progress(STAGE, 1, 3)
    codec = codec_of(vae)
    config = codec.config(vae.config)
    slots = codec.cache_slots(config, latent_height=latent_height, latent_width=latent_width)
    names = [cache_name(index) for index in range(len(slots))]
    filled = [name for name, slot in zip(names, slots, strict=True) if not slot.skips_first]
    latent = torch.empty(1, config.z_dim, latent_height, latent_width)
    caches = [torch.empty(slot.shape, dtype=vae.dtype) for slot in slots]
    first = torch.export.export(codec.first_step(vae).eval(), (latent,), strict=False)
    _write_graph(first, folder, FIRST_GRAPH, inputs=[LATENT], written=filled)
    on_progress(STAGE, 2, 3)
    following = torch.export.export(
        codec.next_step(vae).eval(), (latent, caches) if caches else (latent,), strict=False
    )
    _write_graph(following, folder, NEXT_GRAPH, inputs=[LATENT, *names], written=names)
    on_progress(STAGE, 3, 3)


def write_vae_weights(vae: Any, path: Path) -> None:
    """Write all weights and the config in the form that `load_vae` reads.

    Raises:
        BuildError: the file cannot be written.
    """
    state = {name: tensor.contiguous() for name, tensor in vae.state_dict().items()}
    config = json.dumps(vae_config_from_mapping(vae.config).to_mapping())
    try:
        with atomic_file(path) as partial:
            save_file(state, partial, {CONFIG_KEY: config})
    except (SafetensorError, OSError) as error:
        size_mib = sum(tensor.nbytes for tensor in state.values()) / 2**20
        raise BuildError(f"cannot write the VAE's weights ({size_mib:.0f} MiB) to {path}: {error}") from error


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention as matrix products and a softmax in float32; scores rounded to 16 bits would cause errors of percents."""
    scores = (q.float() / math.sqrt(q.shape[-1])) @ k.float().transpose(-2, -1)
    return (scores.softmax(-1) @ v.float()).to(q.dtype)


def _write_graph(program: ExportedProgram, folder: Path, name: str, *, inputs: list[str], written: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch warns about its own code
        plain = program.run_decompositions({torch.ops.aten.scaled_dot_product_attention.default: _attention})
    outputs = [FRAMES, *(cache + MADE for cache in written)]
    translated = onnx_from_program(plain, input_names=inputs, output_names=outputs)
    onnx.save(with_shared_weights(translated, folder / VAE_WEIGHTS), folder / name)


def build_vae_engines(
    folder: Path, on_progress: Progress, *, flavour: Flavour, target: str, timing_cache: Path | None
) -> list[str]:
    """Build the two graphs as TensorRT engines for one target in a child process, and return the engines' file names.

    Raises:
        BuildError: TensorRT rejected a graph, or the child process died.
        ExecutorError: TensorRT is not installed.
    """
    requests = vae_engine_requests(f"{flavour.name}-{target}")
    run_child(request_json(flavour, target, folder, timing_cache, requests), target, on_progress)
    return [request.engine for request in requests]


def vae_engine_requests(prefix: str) -> list[EngineRequest]:
    """Requests to `engine_worker` to build the two graphs as TensorRT engines, such as `<prefix>-vae-first.engine`."""
    expected = {"attentions": 0, "lengths": 0, "collectives": 0, "cache_updates": 0, "plugins": 0}
    return [
        EngineRequest(onnx=name, engine=f"{prefix}-{Path(name).stem}.engine", profiles=(), expected=expected)
        for name in (FIRST_GRAPH, NEXT_GRAPH)
    ]
