"""The one line that a long capture shows: samples, rows a second, time left."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

EVERY = 30.0  # seconds between lines where the output is a file and nothing can be drawn over


class Progress:
    """A bar in a terminal, a line every EVERY seconds elsewhere."""

    def __init__(self, samples: int, done: int, rows: int):
        self._rows = 0
        self._started = self._printed = time.monotonic()
        console = Console(stderr=True)
        self._drawn = console.is_terminal
        columns = (
            TextColumn("capture"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("samples  {task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        self._bar = RichProgress(*columns, console=console, disable=not self._drawn)
        self._task = self._bar.add_task("capture", total=samples, completed=done, rate="")
        self._samples, self._done = samples, done
        self._first = done
        if done:
            print(f"going on after {rows:,} published rows, at sample {done:,} of {samples:,}")

    def __enter__(self) -> "Progress":
        self._bar.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.__exit__(kind, error, trace)  # pyright: ignore[reportArgumentType]

    def advance(self, samples: int, rows: int) -> None:
        self._done += samples
        self._rows += rows
        now = time.monotonic()
        speed = self._rows / (now - self._started)
        self._bar.update(self._task, completed=self._done, rate=f"{speed:,.0f} rows/s")
        if not self._drawn and now - self._printed >= EVERY:
            self._printed = now
            left = (self._samples - self._done) * (now - self._started) / (self._done - self._first)
            print(
                f"{self._done:,} of {self._samples:,} samples  {speed:,.0f} rows/s  {left / 60:.1f} min left",
                file=sys.stderr,
                flush=True,
            )
