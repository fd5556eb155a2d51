"""Scoring in several processes of one machine, or in those that a launcher started.

Whole batches are shared out by what they will cost (`mmalign.score_shares`), and each is scored exactly as one process
would. A process ends with whoever
started it: after a kill -9 nobody is left who writes into a results folder that the next run works in.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any

import torch

from mmalign.errors import Stopped, debugging, raised_by_us
from mmalign.jobs import ScoreConfig
from mmalign.score_plan import Plan, Todo
from mmalign.score_shares import share_out
from mmalign.score_worker import Scorer

__all__ = ["Advance", "Ranks", "score_in_processes", "stopped", "told"]

Advance = Callable[[int], None]
PATIENCE = timedelta(days=2)
"""How long ranks wait for the slowest of them. One that dies is heard of at once."""


def stopped(reason: str, config: ScoreConfig) -> Stopped:
    """The error of a run that some process could not finish."""
    kept = f"Finished rows are kept in {config.output}; the same command goes on from there."
    return Stopped(f"Scoring stopped: {reason.rstrip().rstrip('.')}. {kept}")


def told(error: Exception) -> str:
    """What another process says of this error. The traceback, where it is of use, is printed here, where it arose."""
    message = (isinstance(error, ValueError) and raised_by_us(error)) or isinstance(error, Stopped)
    known = message or isinstance(error, OSError | ModuleNotFoundError | torch.OutOfMemoryError)
    if debugging() or not known:
        traceback.print_exception(error)
    return str(error) if message else f"{type(error).__name__}: {error}"


# ------------------------------------------------------------------------------------------------ started here


def score_in_processes(plan: Plan, todo: Sequence[Todo], config: ScoreConfig, advance: Advance) -> None:
    """Score in `config.processes` processes. `Stopped` if one of them dies, after the others have done their part."""
    context = multiprocessing.get_context("spawn")
    number = min(config.processes, len(todo))
    shares = share_out(plan, todo, number)
    threads = max(1, torch.get_num_threads() // number)
    # Not a queue that they share: one that is killed while it writes to it blocks all others.
    pipes = [context.Pipe(duplex=False) for _ in range(number)]
    processes = [
        context.Process(
            target=_process, args=(plan, shares[rank], config, rank, number, threads, pipes[rank][1]), daemon=True
        )
        for rank in range(number)
    ]
    try:
        with _ignoring_interrupts():
            for process, (_, theirs) in zip(processes, pipes, strict=True):
                process.start()
                theirs.close()  # so that it ends with the process
        failed = _heard(processes, [ours for ours, _ in pipes], advance)
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
            process.join()
    failed += [f"process {rank} {_end(p.exitcode)}" for rank, p in enumerate(processes) if p.exitcode != 0]
    if failed:
        raise stopped(failed[0], config)


def _heard(processes: Sequence[BaseProcess], pipes: list[Connection], advance: Advance) -> list[str]:
    """Listens until all processes have ended: counts of results go on to `advance`, the rest is what went wrong."""
    failed: list[str] = []
    alive = ready = True
    while alive or ready:
        alive = any(process.is_alive() for process in processes)
        heard = wait(pipes, 0.2 if alive else 0)
        ready = bool(heard)
        for pipe in [each for each in pipes if each in heard]:
            try:
                message = pipe.recv()
            except (EOFError, OSError):  # it has ended, perhaps in the middle of a word
                pipes.remove(pipe)
                continue
            if isinstance(message, int):
                advance(message)
            else:
                failed.append(message)
    return failed


def _end(code: int | None) -> str:
    if code is None or code >= 0:
        return f"ended with code {code}"
    killed = " (by hand, or by the system where memory ran out)" if -code == signal.SIGKILL else ""
    return f"was ended by {signal.Signals(-code).name}{killed}"


@contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """Processes that start here never hear of Ctrl-C, which reaches the whole group: their parent ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _process(
    plan: Plan, todo: Sequence[Todo], config: ScoreConfig, rank: int, share: int, threads: int, pipe: Connection
) -> None:
    end_with_parent()
    torch.set_num_threads(threads)
    try:
        with closing(Scorer(plan, config, rank, share)) as scorer:
            for count in scorer.score(todo):
                pipe.send(count)
    except Exception as error:  # the parent names it to the user
        pipe.send(f"process {rank}: {told(error)}")
        raise SystemExit(1) from None


def end_with_parent() -> None:
    """Have this process end when its parent does, even by kill -9."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


# ------------------------------------------------------------------------------------------------ started by a launcher


class Ranks:
    """The processes that `accelerate launch` or `torchrun` started, this one among them.

    Only their results' folder is shared: rank 0 plans for all, and once every rank has done its part settles and
    summarises alone. Messages go over gloo, which needs no GPU.
    """

    def __init__(self) -> None:
        self.rank, self.number = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.here = int(os.environ.get("LOCAL_RANK", self.rank))
        self.share = int(os.environ.get("LOCAL_WORLD_SIZE", self.number))

    @staticmethod
    def launched() -> bool:
        """Whether a launcher started this process and others."""
        return int(os.environ.get("WORLD_SIZE", "1")) > 1

    def __enter__(self) -> Ranks:
        end_with_parent()
        torch.distributed.init_process_group("gloo", rank=self.rank, world_size=self.number, timeout=PATIENCE)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        torch.distributed.destroy_process_group()

    def from_first(self, value: Any) -> Any:
        """Rank 0's value, in every rank."""
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def score(self, plan: Plan, todo: Sequence[Todo], config: ScoreConfig, advance: Advance) -> None:
        """Score this rank's part of the batches, `todo`, and wait until all have theirs.

        Raises:
            Stopped: in rank 0, if some rank could not finish.
            SystemExit: likewise in the others.
        """
        problem = None
        try:
            with closing(Scorer(plan, config, self.rank, self.share, self.here)) as scorer:
                for count in scorer.score(todo):
                    advance(count)
        except Exception as error:  # told to rank 0, which names it to the user
            problem = f"rank {self.rank}: {told(error)}"
        found: list[str | None] = [None] * self.number
        try:
            torch.distributed.all_gather_object(found, problem)
        except RuntimeError as error:  # gloo's word for a rank that is gone
            found[self.rank] = problem or f"another rank ended ({str(error).splitlines()[0]})"
        problems = [each for each in found if each]
        if problems and self.rank == 0:
            raise stopped(problems[0], config)
        if problems:
            raise SystemExit(1)
