"""A session on disk, to be resumed after a restart, by another executor of the same weights, or when memory is short.

    session.safetensors     prompt embeddings; the header has the session's position, seed and config, and the sha256 of
                            everything, the header itself included
    rank0.safetensors ...   what each rank holds: keys and values of history, the clean chunks that `recache` needs
    decoder.safetensors     the decoder's position in the video, if the session makes frames

A snapshot is written to a temporary folder and renamed. Ranks write and read their own files, and compare what they have read
with the sha256 in the session's file. Keys and values are stored `[rows, heads, D]` by layer and shard, in whatever order an
executor holds them. Only tensors and a JSON header are ever read.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from causalrt.atomic_files import atomic_folder
from causalrt.engines.bundle import WEIGHTS, Bundle, file_digest, record_digest, tensor_digest
from causalrt.errors import RequestError
from causalrt.regular_files import regular_file

SESSION_FILE, DECODER_FILE = "session.safetensors", "decoder.safetensors"
TEXT, AHEAD, HEADER = "text", "ahead", "causalrt.session"
VERSION = 2
"""Version 1 had no digests."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionRecord:
    """The position of a session, and what it was begun with.

    Attributes:
        seed: seed of its noise.
        num_given: chunks of initial latents that it began with.
        next_chunk: number of the chunk that comes next.
        num_chunks: chunks of the whole session.
        vae: sha256 of the VAE's weights; None if the snapshot does not hold the decoder's position.
    """

    seed: int
    num_given: int
    next_chunk: int
    num_chunks: int
    vae: str | None


def rank_file(rank: int) -> str:
    """Name of the file that a rank writes."""
    return f"rank{rank}.safetensors"


def identity(bundle: Bundle) -> dict[str, Any]:
    """What a snapshot depends on: the weights, and all that determines the contents of a rank's KV slots."""
    return {"version": VERSION, "weights": bundle.hashes[WEIGHTS], "config": bundle.config.as_dict()}


@contextlib.contextmanager
def new_snapshot(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary folder to fill; rename it to `target` if the block succeeds, and remove it otherwise.

    Raises:
        RequestError: `target` exists already, or cannot be written.
    """
    target = target.absolute()
    is_snapshot = (target / SESSION_FILE).is_file()
    if target.exists() and not (overwrite and is_snapshot):
        why = "choose another folder, or pass overwrite=True" if is_snapshot else "it is no snapshot; choose another"
        raise RequestError(f"{target} exists already: {why}")
    try:
        with atomic_folder(target, replaces=SESSION_FILE if overwrite else None, private=True) as work:
            yield work
    except OSError as error:
        raise RequestError(
            f"cannot write a snapshot to {target}, what was there is as it was: {error}; make room, or choose a writable folder"
        ) from error


def write_session(
    folder: Path, bundle: Bundle, record: SessionRecord, text: torch.Tensor, ahead: torch.Tensor | None
) -> None:
    """Write the session's file, after all others; `ahead` holds the next chunk's rows if the ranks have generated it."""
    tensors = {TEXT: text, **({} if ahead is None else {AHEAD: ahead})}
    plain: dict[str, Any] = {
        **identity(bundle),
        "session": asdict(record),
        "tensors": {name: tensor_digest(tensor) for name, tensor in tensors.items()},
        "files": {path.name: file_digest(path) for path in sorted(folder.iterdir())},
    }
    header = json.dumps({**plain, "digest": record_digest(plain)})
    save_tensors(tensors, folder / SESSION_FILE, {HEADER: header})


def read_session(
    folder: Path, bundle: Bundle
) -> tuple[SessionRecord, torch.Tensor, torch.Tensor | None, dict[str, str]]:
    """Read the session's file.

    Returns:
        The session's position, its prompt's embeddings, the rows `[N, 64]` of the next chunk if that was generated ahead, and
        the sha256 of every other file by name.

    Raises:
        RequestError: no snapshot, damaged, or of other weights or another config.
    """
    path = folder / SESSION_FILE
    try:
        plain, tensors = _read_header(path, folder)
        files = dict(plain.pop("files"))
        record = SessionRecord(**plain.pop("session"))
        text, ahead = tensors[TEXT], tensors.get(AHEAD)
    except RequestError:
        raise
    except FileNotFoundError:
        raise RequestError(
            f"{folder} is no snapshot: it has no {SESSION_FILE}; make one with session.snapshot(...)"
        ) from None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{path} is damaged ({type(error).__name__}: {error}); take another snapshot") from error
    wanted = identity(bundle)
    differing = [key for key in wanted if plain.get(key) != wanted[key]]
    if differing:
        raise RequestError(
            f"{folder} was made with another bundle ({', '.join(differing)} differ); resume it with the one it was made with, "
            "or with one of the same checkpoint and config"
        )
    if not _is_possible(bundle, record, text, ahead, files):
        raise RequestError(f"{path} is damaged: its values are not possible; take another snapshot")
    for name, tensor in tensors.items():
        check_finite(path, name, tensor)
    return record, text, ahead, files


def _read_header(path: Path, folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The header and the tensors of the session's file, once their digests have been compared."""
    with safe_open(regular_file(path), framework="pt") as file:
        plain = dict(json.loads((file.metadata() or {})[HEADER]))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if plain.get("version") != VERSION:
        raise RequestError(
            f"{folder} is a snapshot of version {plain.get('version')}, and this version of CausalRT reads {VERSION} "
            "(version 1 has no checksums); take another snapshot"
        )
    if plain.pop("digest") != record_digest(plain):
        raise ValueError("its header was changed")
    if plain.pop("tensors") != {name: tensor_digest(tensor) for name, tensor in tensors.items()}:
        raise ValueError("its tensors were changed")
    return plain, tensors


def _is_possible(
    bundle: Bundle,
    record: SessionRecord,
    text: torch.Tensor,
    ahead: torch.Tensor | None,
    files: Mapping[str, str],
) -> bool:
    """Whether the values of the session's file are such as `write_session` writes."""
    model = bundle.config.model
    names = {rank_file(rank) for rank in range(bundle.config.build.world_size)} | (
        set() if record.vae is None else {DECODER_FILE}
    )
    numbers = (record.seed, record.num_given, record.next_chunk, record.num_chunks)
    return (
        all(type(number) is int and number >= 0 for number in numbers)
        and type(record.vae) in (str, type(None))
        and record.seed < 2**64
        and max(numbers[1:]) <= 2**40
        and text.shape == (model.text_len, model.text_dim)
        and text.dtype == torch.float32
        and files.keys() == names
        and (ahead is None or (ahead.dtype == torch.float32 and list(ahead.shape) == _rows_of(bundle, record)))
    )


def _rows_of(bundle: Bundle, record: SessionRecord) -> list[int]:
    config = bundle.config
    (frames,) = config.video.frames_of_chunks(1, first_chunk=record.num_given + record.next_chunk)
    return [frames * config.tokens_per_frame, config.model.patch_features]


def check_finite(path: Path, name: str, tensor: torch.Tensor) -> None:
    """Check that a tensor holds no values that would spread over everything generated after it.

    Raises:
        RequestError: it holds NaN or infinity.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return
    if not all(math.isfinite(bound) for bound in torch.stack(torch.aminmax(tensor)).tolist()):
        raise RequestError(
            f"{path}: {name} holds NaN or infinity, and no session can go on from that; resume an earlier snapshot, or begin "
            "another session"
        )


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path, header: dict[str, str]) -> None:
    """Write a file of a snapshot; the session is unchanged even if that fails.

    Raises:
        RequestError: the file cannot be written, or the session holds values that are not finite.
    """
    for name, tensor in tensors.items():
        check_finite(path, name, tensor)
    try:
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, path, header)
    except (OSError, SafetensorError) as error:
        size = sum(tensor.nbytes for tensor in tensors.values()) / 2**20
        raise RequestError(f"cannot write {path.name} of the snapshot ({size:.0f} MiB): {error}; make room") from error


def load_tensors(path: Path, sha256: str) -> dict[str, torch.Tensor]:
    """Read a file of a snapshot.

    Args:
        path: the file.
        sha256: digest that it must have.

    Raises:
        RequestError: the file is missing, damaged or another one, or holds values that are not finite.
    """
    try:
        tensors = load_file(regular_file(path))
        found = file_digest(path)
    except FileNotFoundError:
        raise RequestError(f"{path} is missing; take another snapshot") from None
    except (OSError, SafetensorError) as error:
        raise RequestError(f"{path} cannot be read: {error}; take another snapshot") from error
    if found != sha256:
        raise RequestError(
            f"{path} is damaged, or of another rank or snapshot: it is not what was written (sha256 differs); take another "
            "snapshot"
        )
    for name, tensor in tensors.items():
        check_finite(path, name, tensor)
    return tensors


def check_tensors(
    path: Path, found: Mapping[str, torch.Tensor], wanted: Mapping[str, tuple[list[int], torch.dtype]]
) -> None:
    """Check names, shapes and types of tensors.

    Raises:
        RequestError: a tensor is missing, unexpected, or of another shape or type.
    """
    for name in sorted({*found, *wanted}):
        have = (list(found[name].shape), found[name].dtype) if name in found else "nothing"
        if have != wanted.get(name, "nothing"):
            raise RequestError(
                f"{path} is damaged: {name} is {have}, wanted {wanted.get(name, 'nothing')}; take another snapshot"
            )
