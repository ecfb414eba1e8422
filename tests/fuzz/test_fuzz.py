"""A share of `make fuzz`, and what the harness itself finds."""

from __future__ import annotations

import os
import time
from collections import Counter
from random import Random

import pytest

from fuzz import harness
from fuzz.harness import Slice, check_input, fuzz, load_targets, make_slices
from fuzz.mutate import MAX_BYTES, Mutator
from fuzz.target import Setup
from sfumato.errors import UserError

INPUTS = int(os.environ.get("FUZZ_INPUTS", "1000"))  # of all targets together


@pytest.mark.full
def test_no_reader_fails() -> None:
    (slices,) = make_slices(list(load_targets().values()), INPUTS, jobs=1)
    assert not [str(fault) for fault in fuzz(slices, seed=int(os.environ.get("FUZZ_SEED", "0")))]


def refuse(_data: bytes) -> None:
    raise UserError("x", code="x-y")


def fail(_data: bytes) -> None:
    raise KeyError("x")


def spin(_data: bytes) -> None:
    end = time.process_time() + 0.05
    while time.process_time() < end:
        pass


def never_end(_data: bytes) -> None:
    while True:
        pass


def test_what_counts_as_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "SLOW_SECONDS", 0.02)
    monkeypatch.setattr(harness, "HANG_SECONDS", 0.1)
    found = [check_input(Setup(seeds=[], read=read), b"a") for read in (len, refuse, fail, spin, never_end)]
    kinds = [fault and fault[0].partition(" in ")[0] for fault in found]
    assert kinds == [None, None, "KeyError", "slow", "hang"]
    assert check_input(Setup(seeds=[], read=fail, documented=(KeyError,)), b"a") is None


def test_memory_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = iter((0, 2 << 30))
    monkeypatch.setattr(harness, "get_peak_memory", lambda: next(peaks))
    found = check_input(Setup(seeds=[], read=len), b"a")
    assert found is not None
    assert found[0] == "memory"


def test_inputs_are_a_function_of_the_seed() -> None:
    seeds, tokens = [b"abc 12 {}" * 20, b"\x00\x01\x02" * 30], [b"token"]
    first = [Mutator(Random(i), tokens).make_input(seeds) for i in range(200)]
    assert first == [Mutator(Random(i), tokens).make_input(seeds) for i in range(200)]
    assert len(set(first)) > 190
    assert sum(data in seeds for data in first) < 10  # a cut at the end, or zero over zero
    assert max(map(len, first)) <= MAX_BYTES


@pytest.mark.parametrize("jobs", [1, 2, 3])
def test_slices_cover_every_input_once(jobs: int) -> None:
    targets = list(load_targets().values())
    covered = Counter[tuple[str, int]]()
    for slices in make_slices(targets, 3000, jobs):
        for part in slices:
            covered.update((part.target, index) for index in range(part.first, part.last))
    assert set(covered.values()) == {1}
    assert {target for target, _ in covered} == {target.name for target in targets}
    assert abs(len(covered) - 3000) < 3 * len(targets)


@pytest.mark.full
def test_an_input_that_ends_the_process_is_named() -> None:
    """The rest of its slice is read by another process: of five inputs the second and the fourth end theirs."""
    faults = list(fuzz([Slice("fuzz.ending", "ending", 0, 5)], seed=0))
    assert [(fault.target, fault.index, fault.kind) for fault in faults] == [
        ("ending", 1, "ended with 7"),
        ("ending", 3, "ended with 7"),
    ]
