"""Fuzzes every reader of foreign bytes and text: `make fuzz`, or one target, or one input again with its traceback.

PYTHONPATH=src:tests python -m fuzz --count 200000 --seed 0 --jobs 2
PYTHONPATH=src:tests python -m fuzz --target tar_archive --input 1234
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fuzz.harness import MAX_FAULTS, Fault, Slice, fuzz, load_targets, make_input, make_slices
from fuzz.target import Target


def main() -> int:
    """1 where a fault was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200_000, help="inputs of all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--target", nargs="+", help="only these")
    parser.add_argument("--input", type=int, help="read this one input of the target here")
    options = parser.parse_args()
    known = load_targets()
    chosen = [known[name] for name in options.target or known]
    if options.input is not None:
        read_one(chosen[0], options.seed, options.input)
        return 0
    start = time.monotonic()
    faults = run_jobs(make_slices(chosen, options.count, options.jobs), options.seed)
    print(f"{len(faults)} faults, {len(chosen)} targets, {options.count} inputs, {time.monotonic() - start:.0f} s")
    return int(bool(faults))


def run_jobs(jobs: list[list[Slice]], seed: int) -> list[Fault]:
    """Each job in a child of its own; faults are printed as they come."""
    faults: dict[tuple[str, str], Fault] = {}
    counts = Counter[str]()

    def run_job(slices: list[Slice]) -> None:
        for fault in fuzz(slices, seed):
            if (fault.target, fault.kind) not in faults:
                faults[fault.target, fault.kind] = fault
                counts[fault.target] += 1
                if counts[fault.target] <= MAX_FAULTS:
                    print(fault, flush=True)

    with ThreadPoolExecutor(len(jobs)) as pool:
        list(pool.map(run_job, jobs))
    return list(faults.values())


def read_one(target: Target, seed: int, index: int) -> None:
    """Without a guard, so that a debugger or the traceback shows where it ends."""
    with tempfile.TemporaryDirectory() as folder:
        setup = target.prepare(Path(folder))
        data = make_input(target, setup, seed, index)
        print(f"{len(data)} bytes: {data[:300]!r}")
        print(setup.read(data))


if __name__ == "__main__":
    sys.exit(main())
