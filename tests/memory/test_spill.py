"""A step that is slow since the GPU is full is told apart from one that is slow for another reason."""

from __future__ import annotations

import pytest

from sfumato.memory.device_memory import FreeMemory
from sfumato.memory.spill import FEWEST, WINDOW, SpillWatch, is_spilling

GB = 10**9
FULL, ROOMY = FreeMemory(GB // 10, 12 * GB), FreeMemory(5 * GB, 12 * GB)


@pytest.mark.parametrize(
    ("seconds", "earlier", "memory", "expected"),
    [
        (3.1, [1.0] * FEWEST, FULL, True),
        (3.0, [1.0] * FEWEST, FULL, False),
        (3.1, [1.0] * FEWEST, ROOMY, False),  # slow data, a sleeping laptop
        (3.1, [1.0] * (FEWEST - 1), FULL, False),
        (3.1, [1.0] * 4 + [30.0] * 3, FULL, True),  # the median: a few slow ones before do not hide it
        (3.1, [], FULL, False),
    ],
)
def test_when_memory_spills(seconds: float, earlier: list[float], memory: FreeMemory, expected: bool) -> None:
    assert is_spilling(seconds, earlier, memory) == expected


def test_it_is_told_once_and_memory_is_asked_for_at_slow_steps_alone() -> None:
    watch, asked = SpillWatch(), []

    def read_memory() -> FreeMemory:
        asked.append(True)
        return FULL

    said = [watch.check_step([(1, 4, 8, 8)], seconds, read_memory) for seconds in [1.0] * 10 + [9.0, 9.0, 1.0]]
    assert [bool(line) for line in said] == [False] * 10 + [True] + [False] * 2
    assert len(asked) == 1
    for part in ("9.00 s", "1.00 s", "0.10", "12.0 GB", "--gradient_checkpointing", "--train_batch_size"):
        assert part in said[10]


def test_steps_of_other_shapes_are_not_compared() -> None:
    watch = SpillWatch()
    for _ in range(2 * WINDOW):
        assert not watch.check_step([(1, 4, 8, 8)], 1.0, lambda: FULL)
        assert not watch.check_step([(1, 4, 32, 32)], 9.0, lambda: FULL)
    assert watch.check_step([(1, 4, 32, 32)], 28.0, lambda: FULL)


def test_the_first_steps_are_forgotten() -> None:
    watch = SpillWatch()
    for seconds in [50.0] * FEWEST + [1.0] * WINDOW:
        watch.check_step([(1,)], seconds, lambda: ROOMY)
    assert watch.check_step([(1,)], 4.0, lambda: FULL)


def test_a_device_that_does_not_say_is_left_alone() -> None:
    watch = SpillWatch()
    assert not any(watch.check_step([(1,)], seconds, lambda: None) for seconds in [1.0] * 10 + [9.0])
