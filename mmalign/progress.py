"""Progress of anything longer than a few seconds: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

T = TypeVar("T")
SHOWN = ("loss", "reward", "implicit_accuracy", "pairwise_accuracy", "retrieval_accuracy", "margin", "l2", "grad_norm")


class Progress:
    """`with Progress("sampling", total) as bar: bar.update(done, {"loss": 0.1})`."""

    def __init__(self, title: str, total: int, done: int = 0, *, quiet: bool = False, seconds: float = 20.0):
        self.title, self.total, self.seconds = title, total, seconds
        self._console = Console(stderr=True)
        self._quiet, self._first, self._said = quiet, time.monotonic(), time.monotonic()
        self._start: float = done
        self._done: float = done
        self._bar: Bar | None = None
        if self._console.is_terminal and not quiet:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                       TimeRemainingColumn(), TextColumn("{task.fields[note]}"))  # fmt: skip
            self._bar = Bar(*columns, console=self._console)
            self._task = self._bar.add_task(title, total=total, completed=done, note="")

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, done: float, values: Mapping[str, float] | None = None) -> None:
        """Says how far it is, parts of an item counted; `values` are shown beside the bar."""
        self._done = done
        note = "  ".join(f"{name} {values[name]:.4g}" for name in SHOWN if values and name in values)
        if self._bar:
            self._bar.update(self._task, completed=done, note=note)
        elif not self._quiet and time.monotonic() - self._said >= self.seconds:
            self._said = time.monotonic()
            rate = (done - self._start) / max(1e-9, self._said - self._first)
            left = (self.total - done) / rate if rate else float("inf")
            print(f"{self.title}: {done:g}/{self.total}, {left:.0f} s left  {note}", file=sys.stderr, flush=True)


def track(items: Iterable[T], title: str, total: int) -> Iterator[T]:
    """Yields the items and shows how many are done."""
    with Progress(title, total) as bar:
        for done, item in enumerate(items, 1):
            yield item
            bar.update(done)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' own load report and progress bar off the screen: the faults are told once, by us."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
