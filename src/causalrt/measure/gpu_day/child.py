"""The process of one part: `python -m causalrt.measure.gpu_day.child MODULE RECORD SETTINGS`, started by `runner.py`."""

import importlib
import os
import signal
import sys
import threading
import traceback
from pathlib import Path

import torch

from causalrt.engines.streams import own_stream
from causalrt.measure.gpu_day.book import Book, Settings, SkippedError, one_line


def _end_with_parent() -> None:
    """End this process and what it has started when the parent, which holds the other end of stdin, has ended."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.killpg(0, signal.SIGKILL)


def main() -> int:
    """Run the part; its record tells how it went."""
    module, record, settings = sys.argv[1:]
    threading.Thread(target=_end_with_parent, daemon=True).start()
    book = Book(Settings.from_text(settings), Path(record))
    book.save()
    try:
        if book.device.type == "cuda":
            torch.cuda.set_device(book.device)
        with own_stream(book.device):
            importlib.import_module(module).run(book)
    except SkippedError as reason:
        book.record.skipped = str(reason)
    except Exception as error:
        traceback.print_exc()
        book.record.error = one_line(error)
    book.save()
    sys.stdout.flush()
    sys.stderr.flush()
    return 1 if book.record.error else 0


if __name__ == "__main__":
    os._exit(main())  # unloading CUDA libraries would take seconds of the budget, and may crash
