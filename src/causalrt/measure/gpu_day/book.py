"""What a part writes down while it runs: every line is on disk before the next one is begun."""

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

Row = Mapping[str, Any]


class SkippedError(Exception):
    """A part, or the rest of it, cannot run here; the message says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What a part is told.

    Attributes:
        out: the folder of the report.
        work: a folder for files that parts leave for later ones; removed at the end.
        golden: the folder of recorded rollouts.
        dry_run: run on the CPU, at the smallest size.
    """

    out: Path
    work: Path
    golden: Path
    dry_run: bool

    def as_text(self) -> str:
        """JSON; `from_text` is the way back."""
        return json.dumps({name: str(value) if name != "dry_run" else value for name, value in asdict(self).items()})

    @classmethod
    def from_text(cls, text: str) -> "Settings":
        """See `as_text`."""
        plain = json.loads(text)
        dry_run = plain.pop("dry_run")
        return cls(**{name: Path(value) for name, value in plain.items()}, dry_run=dry_run)


@dataclass(kw_only=True, slots=True)
class Record:
    """What a part has found so far.

    Attributes:
        headline: sentences for the report's first paragraph, by topic.
        tables: rows by title.
        facts: single values by name.
        notes: what a reader of the tables must know.
        wrong: what came out wrong; a part with such a line has failed.
        files: names of files in the report's folder.
        data: for pictures.
        skipped: why the part did not run.
        error: what ended it.
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


class Book:
    """A part's record, written to a file whenever it changes.

    Attributes:
        settings: what the part is told.
        device: the first GPU, or in a dry run the CPU.
        record: what was written so far.
    """

    def __init__(self, settings: Settings, path: Path) -> None:
        self.settings, self.record, self._path = settings, Record(), path
        self.device = torch.device("cpu") if settings.dry_run else torch.device("cuda", 0)

    @property
    def dry_run(self) -> bool:
        """Whether this is a trial on a CPU."""
        return self.settings.dry_run

    def row(self, table: str, /, **columns: Any) -> None:
        """Add a row to a table."""
        self.record.tables.setdefault(table, []).append(columns)
        self.save()

    def table(self, table: str, rows: Sequence[Row]) -> None:
        """Replace a table."""
        self.record.tables[table] = [dict(row) for row in rows]
        self.save()

    def fact(self, name: str, value: Any) -> None:
        """Write a single value."""
        self.record.facts[name] = value
        self.save()

    def headline(self, topic: str, sentence: str) -> None:
        """Say something in the report's first paragraph, in the place of what was said on this topic."""
        self.record.headline[topic] = sentence
        self.save()

    def note(self, text: str) -> None:
        """Say what a reader must know; once."""
        if text not in self.record.notes:
            self.record.notes.append(text)
            self.save()

    def wrong(self, text: str) -> None:
        """Something came out wrong: the part has failed, and goes on."""
        self.record.wrong.append(text)
        self.save()

    def data(self, name: str, value: Any) -> None:
        """Keep values that a picture is drawn from."""
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
        """Write an error in the block down and go on, unless it has broken the GPU's context: that ends the part."""
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
        """Write the record; a reader finds the old one or the new one."""
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self.record), default=str))
        os.replace(partial, self._path)


def one_line(error: BaseException, most: int = 400) -> str:
    """An error's kind and the beginning of its message."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:most]}" if text else type(error).__name__
