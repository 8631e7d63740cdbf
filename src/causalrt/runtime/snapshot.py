"""A session on disk, to be taken up again: after a restart, by another executor of the same weights, or when memory is short.

    session.safetensors     prompt embeddings; in the header where the session stands, its seed, and what it was made with
    rank0.safetensors ...   what each rank holds: keys and values of history, the clean chunks that `recache` wants
    decoder.safetensors     the decoder's place in the video, if frames are made

A folder appears whole or not at all. Ranks write and read their own files. Keys and values are stored `[rows, heads, D]` by
layer and share, whatever order an executor keeps them in. Nothing but tensors and a JSON header is ever read.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from causalrt.atomic_files import whole_folder
from causalrt.engines.bundle import WEIGHTS, Bundle
from causalrt.errors import RequestError

SESSION_FILE, DECODER_FILE = "session.safetensors", "decoder.safetensors"
TEXT, AHEAD, HEADER = "text", "ahead", "causalrt.session"
VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionRecord:
    """Where a session stands.

    Attributes:
        seed: of its noise.
        num_given: chunks that it began with.
        next_chunk: number of the chunk that comes next.
        num_chunks: of the whole session.
        vae: sha256 of the VAE's weights, if the decoder's place is in the snapshot, too.
    """

    seed: int
    num_given: int
    next_chunk: int
    num_chunks: int
    vae: str | None


def rank_file(rank: int) -> str:
    """Name of a rank's file."""
    return f"rank{rank}.safetensors"


def identity(bundle: Bundle) -> dict[str, Any]:
    """What a snapshot is tied to: weights, and everything that decides what lies in the slots of a rank."""
    return {"version": VERSION, "weights": bundle.hashes[WEIGHTS], "config": bundle.config.as_dict()}


@contextlib.contextmanager
def new_snapshot(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder beside `target` to fill; it takes `target`'s place if the block ends well, and is removed if not.

    Raises:
        RequestError: there is something at `target`, or nothing can be written there.
    """
    target = target.absolute()
    is_snapshot = (target / SESSION_FILE).is_file()
    if target.exists() and not (overwrite and is_snapshot):
        why = "choose another folder, or pass overwrite=True" if is_snapshot else "it is no snapshot; choose another"
        raise RequestError(f"{target} exists already: {why}")
    try:
        with whole_folder(target, replaces=SESSION_FILE if overwrite else None, private=True) as work:
            yield work
    except OSError as error:
        raise RequestError(
            f"cannot write a snapshot to {target}, what was there is as it was: {error}; make room, or choose a writable folder"
        ) from error


def write_session(
    folder: Path, bundle: Bundle, record: SessionRecord, text: torch.Tensor, ahead: torch.Tensor | None
) -> None:
    """The caller's own file; `ahead` are the rows of the next chunk, if the ranks have made it already."""
    header = {HEADER: json.dumps({**identity(bundle), "session": asdict(record)})}
    save_tensors({TEXT: text, **({} if ahead is None else {AHEAD: ahead})}, folder / SESSION_FILE, header)


def read_session(folder: Path, bundle: Bundle) -> tuple[SessionRecord, torch.Tensor, torch.Tensor | None]:
    """Where the session stands, its prompt's embeddings, and the rows `[N, 64]` of the next chunk if that was made ahead.

    Raises:
        RequestError: no snapshot, damaged, or of other weights or another config.
    """
    path = folder / SESSION_FILE
    if not path.is_file():  # a pipe, say, would be waited for
        raise RequestError(f"{folder} is no snapshot: it has no {SESSION_FILE}; make one with session.snapshot(...)")
    try:
        with safe_open(path, framework="pt") as file:
            plain = dict(json.loads((file.metadata() or {})[HEADER]))
            text = file.get_tensor(TEXT)
            ahead = file.get_tensor(AHEAD) if AHEAD in file.keys() else None  # noqa: SIM118
        record = SessionRecord(**plain.pop("session"))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{path} is damaged ({type(error).__name__}: {error}); take another snapshot") from error
    wanted = identity(bundle)
    differing = [key for key in wanted if plain.get(key) != wanted[key]]
    if differing:
        raise RequestError(
            f"{folder} was made with another bundle ({', '.join(differing)} differ); resume it with the one it was made with, "
            "or with one of the same checkpoint and config"
        )
    model = bundle.config.model
    numbers = (record.seed, record.num_given, record.next_chunk, record.num_chunks)
    if (
        any(type(number) is not int or number < 0 for number in numbers)
        or type(record.vae) not in (str, type(None))
        or record.seed >= 2**64
        or max(numbers[1:]) > 2**40
        or text.shape != (model.text_len, model.text_dim)
        or text.dtype != torch.float32
        or (ahead is not None and (ahead.dtype != torch.float32 or list(ahead.shape) != _rows_of(bundle, record)))
    ):
        raise RequestError(f"{path} is damaged: its values cannot be; take another snapshot")
    return record, text, ahead


def _rows_of(bundle: Bundle, record: SessionRecord) -> list[int]:
    config = bundle.config
    (frames,) = config.video.frames_of_chunks(1, first_chunk=record.num_given + record.next_chunk)
    return [frames * config.tokens_per_frame, config.model.patch_features]


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path, header: dict[str, str]) -> None:
    """Write a file of a snapshot.

    Raises:
        RequestError: it cannot be written; the session is as it was.
    """
    try:
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, path, header)
    except (OSError, SafetensorError) as error:
        size = sum(tensor.nbytes for tensor in tensors.values()) / 2**20
        raise RequestError(f"cannot write {path.name} of the snapshot ({size:.0f} MiB): {error}; make room") from error


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a file of a snapshot.

    Raises:
        RequestError: missing or damaged.
    """
    if not path.is_file():
        raise RequestError(f"{path} is missing, or no plain file; take another snapshot")
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise RequestError(f"{path} cannot be read: {error}; take another snapshot") from error


def check_tensors(
    path: Path, found: Mapping[str, torch.Tensor], wanted: Mapping[str, tuple[list[int], torch.dtype]]
) -> None:
    """Refuse tensors that are not the wanted ones.

    Raises:
        RequestError: the first that differs is named.
    """
    for name in sorted({*found, *wanted}):
        have = (list(found[name].shape), found[name].dtype) if name in found else "nothing"
        if have != wanted.get(name, "nothing"):
            raise RequestError(
                f"{path} is damaged: {name} is {have}, wanted {wanted.get(name, 'nothing')}; take another snapshot"
            )
