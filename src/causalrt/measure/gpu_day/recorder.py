"""The record of a part, which is on disk after every finding, so that a part that is killed loses nothing."""

import contextlib
import json
import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from causalrt.tools.files import write_whole


class SkippedError(Exception):
    """A part, or the rest of it, cannot run on this machine; the message says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """The settings of a part: folders of the report, of files for later parts, and of recorded rollouts."""

    out: Path
    work: Path
    golden: Path
    dry_run: bool

    def as_text(self) -> str:
        """The settings as JSON."""
        return json.dumps({name: str(value) if name != "dry_run" else value for name, value in asdict(self).items()})

    @classmethod
    def from_text(cls, text: str) -> "Settings":
        """Read what `as_text` has written."""
        plain = json.loads(text)
        dry_run = plain.pop("dry_run")
        return cls(**{name: Path(value) for name, value in plain.items()}, dry_run=dry_run)


@dataclass(kw_only=True, slots=True)
class Record:
    """The findings of a part so far.

    Attributes:
        headline: sentences for the first paragraph of the report, by topic.
        tables: rows by title.
        facts: single values by name.
        notes: what a reader of the tables must know.
        wrong: wrong results; a part that has one has failed.
        files: names of files in the folder of the report.
        data: values that a picture is drawn from.
        skipped: why the part did not run.
        error: the error that ended it.
    """

    headline: dict[str, str] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    skipped: str = ""
    error: str = ""


class Recorder:
    """Writes the record of a part to a file whenever it changes."""

    def __init__(self, settings: Settings, path: Path) -> None:
        self.settings, self.record, self._path = settings, Record(), path
        self.device = torch.device("cpu") if settings.dry_run else torch.device("cuda", 0)

    @property
    def dry_run(self) -> bool:
        """Whether parts run on the CPU at the smallest size."""
        return self.settings.dry_run

    def row(self, table: str, /, **columns: Any) -> None:
        """Add a row to a table."""
        self.record.tables.setdefault(table, []).append(columns)
        self.save()

    def table(self, table: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Replace a table."""
        self.record.tables[table] = [dict(row) for row in rows]
        self.save()

    def fact(self, name: str, value: Any) -> None:
        """Record a single value."""
        self.record.facts[name] = value
        self.save()

    def headline(self, topic: str, sentence: str) -> None:
        """Put a sentence into the first paragraph of the report, replacing an earlier one on this topic."""
        self.record.headline[topic] = sentence
        self.save()

    def note(self, text: str) -> None:
        """Record what a reader must know, unless it is recorded already."""
        if text not in self.record.notes:
            self.record.notes.append(text)
            self.save()

    def wrong(self, text: str) -> None:
        """Record a wrong result: the part has failed, and goes on."""
        self.record.wrong.append(text)
        self.save()

    def data(self, name: str, value: Any) -> None:
        """Record values that a picture is drawn from."""
        self.record.data[name] = value
        self.save()

    def file(self, name: str, contents: bytes) -> None:
        """Write a file beside the report."""
        write_whole(self.settings.out / name, contents)
        if name not in self.record.files:
            self.record.files.append(name)
        self.save()

    @contextlib.contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Record an error in the block and go on, unless it has broken the context of the GPU, which ends the part."""
        try:
            yield
        except SkippedError as reason:
            self.note(f"{what}: skipped, {reason}")
        except Exception as error:
            traceback.print_exc()
            self.wrong(f"{what}: {one_line(error)}")
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
                torch.cuda.empty_cache()

    def save(self) -> None:
        """Write the record in one step, so that a reader never finds half of it."""
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self.record), default=str))
        os.replace(partial, self._path)


def one_line(error: BaseException, most: int = 400) -> str:
    """The type of an error and the beginning of its message."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:most]}" if text else type(error).__name__
