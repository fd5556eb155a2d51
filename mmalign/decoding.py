"""What runs in a process that only decodes: requests in through a socket, pixels out through memory that is shared.

A decoder that hangs, crashes or fills the memory on a stranger's file takes its own process with it and nothing else.
torch is not imported here: that would take ten times as long as all the rest, and 600 MB. `mmalign.score_decode` starts
these processes and asks them.
"""

from __future__ import annotations

import mmap
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Literal

import numpy as np

from mmalign.frame_plans import Timeline, picked
from mmalign.media import FramePlan, MediaError, Source, read_image
from mmalign.stills import are_stills, read_stills
from mmalign.video import read_frames

__all__ = ["MAPPED", "Answer", "Request", "serve"]

MAPPED = 64 << 20
"""Bytes of shared memory that stay mapped; what needs more gets it for the one item."""
GRACE = 2.0


@dataclass(frozen=True)
class Request:
    """One file to decode.

    Attributes:
        modality: image or video.
        plans: for which clips of the media are wanted.
        seconds: after which nobody waits for the answer any more.
        max_pixels: of an image; larger ones are refused.
        max_bytes: of the frames that are picked of a clip, as uint8 RGB.
        fps: of a clip that is a folder of pictures, which states none.
    """

    media: Source
    modality: str
    plans: tuple[FramePlan, ...]
    decoder: Literal["auto", "decord", "pyav"]
    seconds: float
    max_pixels: int
    max_bytes: int
    fps: float | None = None


@dataclass(frozen=True)
class Answer:
    """What was found, or why nothing was.

    Attributes:
        shapes: [T, 3, H, W] of arrays of uint8 that lie in the shared memory one behind the other.
        clips: the number of the array for each plan; plans that pick the same frames share one.
        fps, decoder: of a clip; None for an image.
    """

    shapes: tuple[tuple[int, int, int, int], ...] = ()
    clips: dict[FramePlan, int] = field(default_factory=dict)
    fps: float | None = None
    decoder: str | None = None
    problem: str | None = None

    @property
    def size(self) -> int:
        """Bytes of all arrays."""
        return sum(int(np.prod(shape)) for shape in self.shapes)


def serve(connection: int, memory: int) -> None:
    """Answer requests until the other end closes.

    Args:
        connection, memory: file descriptors of the socket, and of the memory, which has `MAPPED` bytes.
    """
    socket, mapping = Connection(connection), mmap.mmap(memory, MAPPED)
    socket.send("ready")
    grown = False
    while True:
        try:
            request: Request = socket.recv()
        except (EOFError, ConnectionError):
            return
        # The asker kills a decoder that hangs. Should the asker be gone, the system does it.
        signal.setitimer(signal.ITIMER_REAL, request.seconds + GRACE)
        if grown:
            os.ftruncate(memory, MAPPED)
        answer, arrays = decode(request)
        grown = answer.size > MAPPED
        if grown:
            os.ftruncate(memory, answer.size)
        _write(arrays, mmap.mmap(memory, answer.size) if grown else mapping)
        try:
            socket.send(answer)
        except ConnectionError:
            return
        signal.setitimer(signal.ITIMER_REAL, 0)


def decode(request: Request) -> tuple[Answer, list[list[np.ndarray]]]:
    """The answer, and each of its arrays as T frames uint8 [H, W, 3]."""
    arrays: list[list[np.ndarray]] = []
    try:
        clips, fps, decoder = _read(request, arrays)
    except MediaError as error:
        return Answer(problem=str(error)), []
    shapes = tuple((len(frames), 3, *frames[0].shape[:2]) for frames in arrays)
    return Answer(shapes, clips, fps, decoder), arrays


def _read(request: Request, arrays: list[list[np.ndarray]]) -> tuple[dict[FramePlan, int], float | None, str | None]:
    """Appends the media's arrays; the number of the array for each plan, with the rate and decoder of a clip."""
    media, plans = request.media, request.plans
    if request.modality == "image":
        arrays.append([read_image(media, max_pixels=request.max_pixels)])
        return dict.fromkeys(plans, 0), None, None
    union: Any = _Union(plans)
    if are_stills(media):
        limits = {"max_bytes": request.max_bytes, "max_pixels": request.max_pixels}
        found = read_stills(media, union, fps=request.fps, **limits)
    else:
        found = read_frames(media, union, decoder=request.decoder, max_bytes=request.max_bytes)
    numbers: dict[FramePlan, int] = {}
    places: dict[tuple[int, ...], int] = {}
    for plan in plans:
        indices = picked(plan, found.timeline)
        if indices not in places:
            places[indices] = len(arrays)
            arrays.append([found.picked[index] for index in indices])
        numbers[plan] = places[indices]
    return numbers, found.fps, found.decoder


@dataclass(frozen=True)
class _Union:
    """The frames that any of several plans picks, so that a clip is decoded once for all."""

    plans: tuple[FramePlan, ...]

    def on(self, timeline: Timeline) -> list[int]:
        return sorted({index for plan in self.plans for index in picked(plan, timeline)})


def _write(arrays: Sequence[Sequence[np.ndarray]], memory: mmap.mmap) -> None:
    """Lays the arrays into the memory, each as [T, 3, H, W]."""
    place = 0
    for frames in arrays:
        for frame in frames:
            target = np.ndarray((3, *frame.shape[:2]), np.uint8, memory, place)
            target[:] = frame.transpose(2, 0, 1)
            place += frame.size
