"""Decoding ahead of the scoring: processes that decode, a bounded line of what they found, and pieces of batches.

The order of items is the order of the batches, whatever the number of processes, and where a batch is cut depends on
its items' sizes alone.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

import mmalign
from mmalign.decoding import MAPPED, Answer, Request
from mmalign.errors import Stopped
from mmalign.jobs import Scoring
from mmalign.media import FramePlan, decoder_fingerprint
from mmalign.score_plan import Item, Job, Plan, Todo
from mmalign.source import Source, name_of
from mmalign.tables import MediaRow

__all__ = ["Decoded", "Decoder", "cores"]

MOST_WORKERS = 16
START_SECONDS = 120.0
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
LARGE = 4 << 20
SERVE = "import sys; from mmalign.decoding import serve; serve(int(sys.argv[1]), int(sys.argv[2]))"


@dataclass(frozen=True)
class Decoded:
    """One item's pixels, a clip per frame plan; or the reason why there are none.

    Attributes:
        clips: plan -> uint8 [T, 3, H, W]; in page-locked memory where a GPU is to have them.
        reference: likewise for the reference, where one was asked for.
        fps: of the file; None for an image.
        decoder: what decoded it, with versions.
        problem: why there are no clips.
        reference_problem: why there is no reference, though one was asked for.
        size: bytes.
    """

    clips: dict[FramePlan, Tensor]
    reference: dict[FramePlan, Tensor]
    fps: float | None
    decoder: str
    problem: str | None = None
    reference_problem: str | None = None
    size: int = 0

    def problem_for(self, job: Job) -> str | None:
        """Why this evaluator cannot score the item: a reference counts for those that compare with it alone, and the
        media for those that look at pixels."""
        if not job.sees:
            return None
        return self.problem or (self.reference_problem if "reference" in job.cls.needs else None)


def cores() -> int:
    """How many cores this process may use, by its affinity and its control group's quota."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = CPU_QUOTA.read_text().split() if CPU_QUOTA.is_file() else []
    if len(limit) == 2 and limit[0] != "max":
        found = min(found, math.ceil(int(limit[0]) / int(limit[1])))
    return found


class Decoder:
    """Decodes the items of batches in processes, ahead of whoever takes them.

    Args:
        settings: which decoder, how many processes, how long for one item, how much memory.
        device: where pixels go next; for a GPU they are put into page-locked memory, from where it fetches them by
            itself.
        share: how many scoring processes there are on this machine, which share its cores.
    """

    def __init__(self, settings: Scoring, device: torch.device, share: int = 1):
        self.workers = settings.decode_workers or max(1, min(MOST_WORKERS, cores() // share))
        self._settings, self._device = settings, device
        self._room = int(settings.decode_memory * 2**30 / 2)  # half for what waits, half for what is being scored
        self._fingerprint = decoder_fingerprint()
        self._idle: list[_Process] = []
        self._lock = threading.Lock()  # of who has which process

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes."""
        while self._idle:
            self._idle.pop().end()

    def stream(self, plan: Plan, batches: Sequence[Todo]) -> Iterator[tuple[Todo, dict[int, Decoded]]]:
        """For each batch of (item's index, jobs that want it) the decoded items by index.

        A batch whose pixels take more than half of the memory comes in pieces. What was handed out is emptied when the
        next is asked for.

        Raises:
            Stopped: decoder processes cannot be started here.
        """
        wanted = [(index, jobs) for batch in batches for index, jobs in batch if jobs]
        line = _Line(len(wanted), self._room, self.workers + 2 * max(map(len, batches), default=0))
        busy: set[_Process] = set()
        minders = [
            threading.Thread(target=self._mind, args=(plan, wanted, line, busy), name=f"decode-{n}", daemon=True)
            for n in range(min(self.workers, len(wanted)))
        ]
        try:
            for minder in minders:
                minder.start()
            for batch in batches:
                yield from self._pieces([(index, jobs) for index, jobs in batch if jobs], line)
        finally:
            if not line.finished:
                with self._lock:
                    line.close()
                    for process in busy:
                        process.kill()  # nobody waits for it any more
            for minder in minders:
                minder.join()

    def _pieces(self, batch: Todo, line: _Line) -> Iterator[tuple[Todo, dict[int, Decoded]]]:
        piece: Todo = []
        decoded: dict[int, Decoded] = {}
        size = 0
        for index, jobs in batch:
            piece.append((index, jobs))
            decoded[index] = line.get()
            size += decoded[index].size
            if size >= self._room:
                yield piece, decoded
                decoded.clear()
                piece, size = [], 0
        if piece:
            yield piece, decoded
            decoded.clear()

    def _mind(self, plan: Plan, wanted: Todo, line: _Line, busy: set[_Process]) -> None:
        """A thread: takes items off the line and has a process of its own decode them."""
        process: _Process | None = None
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # else page-locked memory would open a context on the first one
        try:
            while (place := line.take()) is not None:
                index, asked = wanted[place]
                item, jobs = plan.items[index], [job for job in asked if job.sees]
                if not jobs:
                    line.put(place, Decoded({}, {}, None, ""))
                    continue
                if item.problem is not None:
                    line.put(place, Decoded({}, {}, None, self._fingerprint, item.problem))
                    continue
                if process is None or process.dead:
                    with self._lock:
                        busy -= {process}
                        if line.closed:
                            break
                        process = self._idle.pop() if self._idle else _Process()
                        busy.add(process)
                line.put(place, self._decode(process, item, jobs))
        except Exception as error:  # told to whoever takes from the line, in its own thread
            line.fail(error)
        finally:
            self._give_back(process, busy, line)

    def _give_back(self, process: _Process | None, busy: set[_Process], line: _Line) -> None:
        if process is None or process.dead:
            return
        with self._lock:
            busy.discard(process)
            if not line.closed:
                self._idle.append(process)
                return
        process.end()

    def _decode(self, process: _Process, item: Item, jobs: Sequence[Job]) -> Decoded:
        """The media; and its reference apart from it, which may be the only one of the two that can be read."""
        answer, clips = self._ask(process, item.row, item.row.media, [job.cls.frames for job in jobs])
        decoder = answer.decoder or self._fingerprint
        compared = [job.cls.frames for job in jobs if "reference" in job.cls.needs]
        if answer.problem is not None or not compared or item.row.reference is None:
            return Decoded(clips, {}, answer.fps, decoder, answer.problem, size=answer.size)
        if item.reference_problem is not None:
            return Decoded(clips, {}, answer.fps, decoder, None, item.reference_problem, answer.size)
        other, reference = self._ask(process, item.row, item.row.reference, compared)
        return Decoded(clips, reference, answer.fps, decoder, None, other.problem, answer.size + other.size)

    def _ask(
        self, process: _Process, row: MediaRow, media: Source, plans: Sequence[FramePlan]
    ) -> tuple[Answer, dict[FramePlan, Tensor]]:
        asked, own = tuple(dict.fromkeys(plans)), self._settings
        limits = (own.decode_seconds, own.max_pixels, own.max_bytes)
        request = Request(media, row.modality, asked, own.decoder, *limits, row.fps)
        answer, arrays = process.ask(request, self._new)
        return answer, {plan: arrays[number] for plan, number in answer.clips.items()}

    def _new(self, shape: Sequence[int]) -> Tensor:
        pinned, size = self._device.type == "cuda", math.prod(shape)
        if pinned or size < LARGE:
            return torch.empty(tuple(shape), dtype=torch.uint8, pin_memory=pinned)
        # Mapped by itself, at 0.1 ms per MB: malloc keeps for each thread what that thread has freed.
        return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8).view(tuple(shape))


class _Line:
    """What is decoded and not yet taken, in order, with a bound on its bytes and on its number.

    Places are handed out in order, so that the one that is waited for is always at work: the line cannot block itself.
    """

    def __init__(self, length: int, room: int, items: int):
        self._length, self._room, self._items = length, room, items
        self._taken = self._given = self._bytes = 0
        self._found: dict[int, Decoded] = {}
        self._error: Exception | None = None
        self.closed = False
        self._changed = threading.Condition()

    @property
    def finished(self) -> bool:
        """Whether everything was taken."""
        return self._given == self._length

    def take(self) -> int | None:
        """The next place to decode, once there is room; None when there is none left."""
        with self._changed:
            self._changed.wait_for(lambda: self.closed or self._taken == self._length or self._free())
            if self.closed or self._taken == self._length:
                return None
            self._taken += 1
            return self._taken - 1

    def _free(self) -> bool:
        waiting = self._taken - self._given
        return waiting == 0 or (self._bytes < self._room and waiting < self._items)

    def put(self, place: int, found: Decoded) -> None:
        with self._changed:
            self._found[place] = found
            self._bytes += found.size
            self._changed.notify_all()

    def get(self) -> Decoded:
        """The item of the next place, in order, once it is there."""
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or self._given in self._found)
            if self._given not in self._found and self._error is not None:
                raise self._error
            found = self._found.pop(self._given)
            self._given += 1
            self._bytes -= found.size
            self._changed.notify_all()
            return found

    def fail(self, error: Exception) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self.closed = True
            self._changed.notify_all()


class _Process:
    """A process that decodes one item after the other, and the memory in which it leaves the pixels."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self._memory = _nameless_file()
        os.ftruncate(self._memory, MAPPED)
        command = [sys.executable, "-P", "-c", SERVE, str(theirs.fileno()), str(self._memory)]
        places = [str(Path(mmalign.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            command,
            pass_fds=(theirs.fileno(), self._memory),
            stdin=subprocess.DEVNULL,
            process_group=0,  # Ctrl-C reaches the whole group, an interpreter that is starting too
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))},
        )
        theirs.close()
        self._connection = Connection(ours.detach())
        self._mapping = mmap.mmap(self._memory, MAPPED)
        self._ready = self.dead = False

    def ask(self, request: Request, new: Callable[[Sequence[int]], Tensor]) -> tuple[Answer, list[Tensor]]:
        """The answer, and copies of its arrays in tensors from `new`; a process that dies or hangs is a problem too."""
        self._wait_until_ready()
        name = name_of(request.media)
        try:
            self._connection.send(request)
            if not self._connection.poll(request.seconds):
                self.end()
                return Answer(problem=_TOO_LONG.format(name, request.seconds)), []
            answer: Answer = self._connection.recv()
        except (EOFError, ConnectionError):
            how = self._how()
            if how == "was ended by SIGALRM":  # its own clock was the quicker one
                return Answer(problem=_TOO_LONG.format(name, request.seconds)), []
            return Answer(problem=f"{name}: the decoder {how}; write the file again, or drop the row"), []
        memory = self._mapping if answer.size <= MAPPED else mmap.mmap(self._memory, answer.size)
        return answer, _copies(answer.shapes, memory, new)

    def _wait_until_ready(self) -> None:
        """Starting is no part of the time that an item has."""
        if self._ready:
            return
        try:
            if not self._connection.poll(START_SECONDS):
                self.end()
                raise Stopped(f"A decoder process did not start within {START_SECONDS:g} s; is the machine busy?")
            self._connection.recv()
        except (EOFError, ConnectionError):
            raise Stopped(f"A decoder process {self._how()} before its first item.") from None
        self._ready = True

    def _how(self) -> str:
        """How it ended by itself."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        code = self._process.returncode
        self.end()
        if code is None or code >= 0:
            return f"ended with code {code}"
        return f"was ended by {signal.Signals(-code).name}"

    def kill(self) -> None:
        """Kill it, which loses nothing; from any thread."""
        self._process.kill()

    def end(self) -> None:
        """Kill it and let go of its memory."""
        self.dead = True
        self.kill()
        # One that is in a read which never returns outlives the signal; it ends when that does.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._connection.close()
        os.close(self._memory)


_TOO_LONG = "{}: decoding took longer than {:g} s; replace the file, or raise decode_seconds"


def _copies(shapes: Sequence[Sequence[int]], memory: mmap.mmap, new: Callable[[Sequence[int]], Tensor]) -> list[Tensor]:
    copies, place = [], 0
    for shape in shapes:
        copy = new(shape)
        copy.view(-1).copy_(torch.frombuffer(memory, dtype=torch.uint8, count=copy.numel(), offset=place))
        place += copy.numel()
        copies.append(copy)
    return copies


def _nameless_file() -> int:
    """A file descriptor of memory that vanishes with the last process that has it open."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("mmalign-decoded")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
