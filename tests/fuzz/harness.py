"""Feeds inputs to the targets in child processes, and collects what no reader may do.

A fault is an exception other than UserError, an input that takes more than seconds of CPU time or a gigabyte of memory,
or the end of the process. Input i of a target is a function of (seed, target, i), so that each can be made again.
"""

from __future__ import annotations

import importlib
import multiprocessing
import queue
import resource
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

from fuzz.mutate import Mutator
from fuzz.target import TARGETS, Read, Setup, Target
from sfumato.errors import UserError

MODULES = ("images", "archives", "caches", "captions", "options", "runs", "tables", "tokenizers", "weights")
SLOW_SECONDS = 3.0  # of CPU time for an input of 64 KiB: all readers take milliseconds
HANG_SECONDS = 20.0  # of CPU time, after which an input is interrupted
DEAD_SECONDS = 300.0  # without an answer, after which the process is ended
MAX_GROWTH = 1 << 30  # bytes of memory
MAX_FAULTS = 3  # reported of each target; equal ones count once

Report = Callable[
    [int, int], None
]  # slice, input: called before each input, so that one that ends the process is known


class HangError(BaseException):
    """Interrupts a reader; no reader catches it."""


@dataclass(frozen=True)
class Fault:
    """What one input did. kind: equal for equal causes."""

    target: str
    index: int
    kind: str
    message: str

    def __str__(self) -> str:
        return f"{self.target} {self.index}: {self.kind}: {self.message[:200]}"


@dataclass(frozen=True)
class Slice:
    """Inputs first .. last - 1 of a target, which `module` registers."""

    module: str
    target: str
    first: int
    last: int


def find_target(part: Slice) -> Target:
    importlib.import_module(part.module)
    return TARGETS[part.target]


def load_targets() -> dict[str, Target]:
    for module in MODULES:
        importlib.import_module(f"fuzz.{module}")
    return TARGETS


def make_slices(targets: Sequence[Target], count: int, jobs: int) -> list[list[Slice]]:
    """`count` inputs of all targets together, for each of `jobs` processes."""
    whole = sum(target.share for target in targets)
    jobs_slices: list[list[Slice]] = [[] for _ in range(jobs)]
    for target in targets:
        number = max(round(count * target.share / whole), jobs)
        for job, slices in enumerate(jobs_slices):
            slices.append(Slice(target.module, target.name, number * job // jobs, number * (job + 1) // jobs))
    return jobs_slices


def make_input(target: Target, setup: Setup, seed: int, index: int) -> bytes:
    """Input `index` of a target."""
    return Mutator(Random(f"{seed}/{target.name}/{index}"), target.tokens).make_input(setup.seeds)


def run_slices(slices: Sequence[Slice], seed: int, report: Report) -> Iterator[Fault]:
    """Everything in this process, whose memory each slice limits anew."""
    for number, part in enumerate(slices):
        target = find_target(part)
        report(number, -1)
        with tempfile.TemporaryDirectory() as folder:
            setup = target.prepare(Path(folder))
            for data in setup.seeds:
                setup.read(data)  # good inputs are read, so the reader is really reached
            seen: set[str] = set()
            for index in range(part.first, part.last):
                report(number, index)
                found = check_input(setup, make_input(target, setup, seed, index))
                if found and found[0] not in seen:
                    seen.add(found[0])
                    yield Fault(target.name, index, *found)


def check_input(setup: Setup, data: bytes) -> tuple[str, str] | None:
    """(kind, message) of a fault; None where the input is read or refused as it should be."""
    before, start = get_peak_memory(), time.process_time()
    found = catch_fault(setup.read, data, setup.documented)
    seconds = time.process_time() - start
    if found:
        return found
    if seconds > SLOW_SECONDS:
        return "slow", f"{seconds:.1f} s for {len(data)} bytes"
    growth = get_peak_memory() - before
    return ("memory", f"{growth >> 20} MB for {len(data)} bytes") if growth > MAX_GROWTH else None


def catch_fault(read: Read, data: bytes, documented: tuple[type[Exception], ...]) -> tuple[str, str] | None:
    signal.signal(signal.SIGVTALRM, interrupt)
    signal.setitimer(signal.ITIMER_VIRTUAL, HANG_SECONDS)
    try:
        read(data)
    except (UserError, *documented):
        return None
    except HangError as error:
        return f"hang in {find_place(error)}", f"{HANG_SECONDS:.0f} s for {len(data)} bytes"
    except BaseException as error:  # noqa: BLE001 -- what a reader lets through is what is looked for
        return f"{type(error).__name__} in {find_place(error)}", str(error)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    return None


def interrupt(_number: int, _frame: FrameType | None) -> None:
    raise HangError


def find_place(error: BaseException) -> str:
    """The last frame of our own code."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/sfumato/" in frame.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "a library"


def get_peak_memory() -> int:
    """Bytes, of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def limit_memory() -> None:
    """Four gigabytes of addresses more than now: a reader that wants more gets a MemoryError."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 30), resource.RLIM_INFINITY))


def run_child(slices: Sequence[Slice], seed: int, answers: Any, position: Any) -> None:
    """In a child: puts each fault, then None. position: shared (slice, input) that is being read."""
    for module in ("torch", "transformers"):
        importlib.import_module(module)

    def report(number: int, index: int) -> None:
        if index < 0:  # a slice begins: what earlier ones have loaded for good does not count
            limit_memory()
        position[:] = number, index

    for fault in run_slices(slices, seed, report):
        answers.put(fault)
    answers.put(None)


def fuzz(slices: Sequence[Slice], seed: int) -> Iterator[Fault]:
    """Reads the slices in a child; after one that ended without an answer, the next one goes on behind it."""
    context = multiprocessing.get_context("spawn")
    rest = list(slices)
    while rest:
        answers, position = context.Queue(), context.Array("q", [-1, 0])
        child = context.Process(target=run_child, args=(rest, seed, answers, position), daemon=True)
        child.start()
        yield from collect_answers(answers, child, position)
        if child.exitcode == 0:
            return
        number, index = position[:]
        if number < 0:
            yield Fault(rest[0].target, 0, f"ended with {child.exitcode}", "before the first input")
            return
        part = rest[number]
        what = "the process ended while it read this input" if index >= 0 else "a good input was refused"
        yield Fault(part.target, index, f"ended with {child.exitcode}", what)
        rest = [*([replace(part, first=index + 1)] if index >= 0 else []), *rest[number + 1 :]]


def collect_answers(answers: Any, child: Any, position: Any) -> Iterator[Fault]:
    """Faults until the child has ended; one that reads the same input for too long is ended."""
    last, since = position[:], time.monotonic()
    while True:
        try:
            fault = answers.get(timeout=1)
        except queue.Empty:
            if position[:] != last:
                last, since = position[:], time.monotonic()
            elif time.monotonic() - since > DEAD_SECONDS * (3 if last[0] < 0 else 1):
                child.kill()
            if child.is_alive():
                continue
            child.join()
            return
        if fault is None:
            child.join()
            return
        yield fault
