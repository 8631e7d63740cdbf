"""A cache of the embeddings of recent prompts, bounded in bytes.

Encoding a prompt takes seconds on a CPU, whereas keeping its embeddings takes megabytes.
"""

import sys
import threading
from collections import OrderedDict
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheInfo:
    """Number of prompts served from the cache (`hits`) and of prompts encoded (`misses`), and what the cache holds."""

    hits: int
    misses: int
    entries: int
    held_bytes: int
    max_bytes: int


class PromptCache:
    """Embeddings of recent prompts, which with their texts take at most `max_bytes`. It is thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._held_bytes = self._hits = self._misses = 0
        self._lock = threading.Lock()

    def get(self, text: str) -> torch.Tensor | None:
        """Return the embeddings stored under `text`, or None, and mark them as most recently used."""
        with self._lock:
            if text not in self._entries:
                return None
            self._hits += 1
            self._entries.move_to_end(text)
            return self._entries[text]

    def put(self, text: str, embeds: torch.Tensor) -> None:
        """Store `embeds`, and drop those least recently used; embeddings larger than the cache are not stored."""
        with self._lock:
            self._misses += 1
            if text in self._entries:
                self._held_bytes -= _entry_bytes(text, self._entries.pop(text))
            self._entries[text] = embeds
            self._held_bytes += _entry_bytes(text, embeds)
            while self._held_bytes > self._max_bytes:
                self._held_bytes -= _entry_bytes(*self._entries.popitem(last=False))

    def clear(self) -> None:
        """Empty the cache; the counts are kept."""
        with self._lock:
            self._entries.clear()
            self._held_bytes = 0

    def info(self) -> CacheInfo:
        """Return the counts so far."""
        with self._lock:
            return CacheInfo(
                hits=self._hits,
                misses=self._misses,
                entries=len(self._entries),
                held_bytes=self._held_bytes,
                max_bytes=self._max_bytes,
            )


def _entry_bytes(text: str, embeds: torch.Tensor) -> int:
    return sys.getsizeof(text) + embeds.nbytes
