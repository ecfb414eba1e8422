"""A driver that uses main memory for a full GPU: training goes on, many times slower, and nothing says why."""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Sequence

from sfumato.memory.device_memory import FreeMemory

WINDOW = 20  # earlier steps with the same shapes that a step is compared with
FEWEST = 5  # of them, below which nothing is usual yet
SLOWER = 3.0  # times their median
FULL = 0.03  # share of the memory, of which less is free


def is_spilling(seconds: float, earlier: Sequence[float], memory: FreeMemory) -> bool:
    """Whether a step was slow because memory is full. seconds: of the step; earlier: of comparable steps before it."""
    return is_slow(seconds, earlier) and memory.free < FULL * memory.total


def is_slow(seconds: float, earlier: Sequence[float]) -> bool:
    return len(earlier) >= FEWEST and seconds > SLOWER * statistics.median(earlier)


class SpillWatch:
    """Remembers the times of recent steps; speaks once."""

    def __init__(self) -> None:
        self.seconds: dict[Hashable, deque[float]] = defaultdict(lambda: deque(maxlen=WINDOW))
        self.spoken = False

    def check_step(
        self, shapes: Sequence[Sequence[int]], seconds: float, read_memory: Callable[[], FreeMemory | None]
    ) -> str:
        """What to say of this step; empty where there is nothing. shapes: of its batches; memory is read if need be."""
        earlier = self.seconds[tuple(map(tuple, shapes))]
        memory = read_memory() if is_slow(seconds, earlier) and not self.spoken else None
        self.spoken |= (spills := memory is not None and is_spilling(seconds, earlier, memory))
        usual = statistics.median(earlier) if earlier else 0.0
        earlier.append(seconds)
        if memory is None or not spills:
            return ""
        return (
            f"a step took {seconds:.2f} s instead of {usual:.2f} s while only {memory.free / 1e9:.2f} of "
            f"{memory.total / 1e9:.1f} GB on the GPU are free: its driver may be using main memory, which is slow; "
            "close other programs that use the GPU, or need less memory: --gradient_checkpointing, a smaller "
            "--train_batch_size or --resolution"
        )
