"""Two processes that are asked to stop, fail or are killed at chosen moments, from their first line to their last.

`make stops MOMENTS=40` tries 40 moments of each kind and prints a line for each; the full tier tries a few. A moment is
the number of the call to one of the package's functions, so no clock is involved. What a launcher does is done here:
start both processes, pass signals on, and end the other one when one has failed. It does not where one is to learn of
the other's failure by itself.
"""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sfumato.common.stop_signals import exit_process
from sfumato.compat.launch import main
from sfumato.demo.toy import write_toy
from sfumato.formats.state import find_newest_state
from toy_runs import equal_tensors, make_arguments, make_images, read_weights

PACKAGE = str(Path(find_newest_state.__code__.co_filename).parents[1])
STEPS = 8
PATIENCE = 120.0  # seconds until a process counts as hanging
KINDS = ("stop", "error", "kill")
TARGETS = ("rank 0", "rank 1", "both", "launcher")  # who gets the signal


@dataclass(frozen=True, kw_only=True)
class Moment:
    """The call of which process is the moment, and what is sent then to whom."""

    rank: int
    call: int
    target: str = "itself"
    signal: signal.Signals | None = None  # None: the process raises an error

    def __str__(self) -> str:
        what = f"{self.signal.name} to {self.target}" if self.signal else "an error"
        return f"{what} at call {self.call} of rank {self.rank}"

    @property
    def has_launcher(self) -> bool:
        """Whether somebody ends the other process when one has failed."""
        return self.target != "itself"


@dataclass(kw_only=True)
class Ended:
    """How both processes ended."""

    codes: list[int]
    calls: list[list[int]]  # of each rank, at its first step and in all
    messages: list[str]  # of each rank
    timed_out: bool = False
    seconds: float = 0.0
    states: list[str] = field(default_factory=list)


def run_pair(
    arguments: Sequence[str],
    folder: Path,
    moment: Moment | None = None,
    *,
    count: int = 2,
    script: str = "train_network",
    counts_calls: bool = True,
) -> Ended:
    """Train in two processes, or more. They are forked from this one, which has imported everything already.

    counts_calls: False where no call is a moment: it doubles the time.
    """
    started = time.monotonic()
    pids = start_ranks([script, *arguments], folder, moment, count=count, counts_calls=counts_calls)
    codes, timed_out = wait_for_all(pids, end_others=moment is None or moment.has_launcher)
    texts = [(folder / f"rank{rank}.log").read_text() for rank in range(count)]
    calls = [[int(n) for n in (folder / f"calls{rank}").read_text().split()] for rank in range(count)]
    return Ended(codes=codes, calls=calls, messages=texts, timed_out=timed_out, seconds=time.monotonic() - started)


def start_ranks(
    words: Sequence[str], folder: Path, moment: Moment | None = None, *, count: int, counts_calls: bool
) -> list[int]:
    """Fork the processes of a run; gives their ids. words: the script's name and its arguments."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids: list[int] = []
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            run_rank(words, folder, rank, moment, counts_calls=counts_calls)
        pids.append(pid)
    (folder / "pids").write_text(" ".join(map(str, pids)))
    return pids


def run_rank(words: Sequence[str], folder: Path, rank: int, moment: Moment | None, *, counts_calls: bool) -> None:
    """What the forked process does; it does not return."""
    log = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1) for descriptor in (1, 2))  # a test's are others
    counter = CallCounter(lambda: send_signals(folder, moment), moment.call if moment and moment.rank == rank else 0)
    (folder / f"calls{rank}").write_text("")
    code = 1  # of an error that nobody caught
    try:
        sys.setprofile(counter if counts_calls else None)
        code = main([*words])
        sys.setprofile(None)
        (folder / f"calls{rank}").write_text(f"{counter.first_step} {counter.calls}")
        exit_process(code)
    except SystemExit:
        sys.stderr.flush()
    finally:
        if sys.exc_info()[1]:
            traceback.print_exc()
        os._exit(code)


class CallCounter:
    """A profiler that counts the calls of the package's functions, and acts at one of them."""

    def __init__(self, act: Callable[[], None], moment: int) -> None:
        self.act, self.moment, self.calls = act, moment, 0
        self.first_step = 0  # the call that begins it

    def __call__(self, frame: object, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):  # type: ignore[attr-defined]
            self.calls += 1
            if not self.first_step and frame.f_code.co_name == "train_step":  # type: ignore[attr-defined]
                self.first_step = self.calls
            if self.calls == self.moment:
                self.act()


def send_signals(folder: Path, moment: Moment | None) -> None:
    """As a user, a terminal or a launcher would."""
    assert moment is not None
    if moment.signal is None:
        raise RuntimeError("something broke")
    while not (folder / "pids").exists():
        time.sleep(0.01)
    pids = [int(pid) for pid in (folder / "pids").read_text().split()]
    ranks = {"rank 0": [0], "rank 1": [1], "both": [0, 1], "launcher": [1, 0, 1, 0], "itself": [moment.rank]}
    for rank in ranks[moment.target]:  # a launcher sends twice, as torchrun
        try:
            os.kill(pids[rank], moment.signal)
        except ProcessLookupError:  # that one has ended
            continue


def wait_for_all(pids: Sequence[int], *, end_others: bool) -> tuple[list[int], bool]:
    """Exit codes (negative: by a signal), and whether one had to be killed. end_others: when one has failed."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + PATIENCE
    passed_on = False
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(ended[1])
        if end_others and any(codes.values()) and not passed_on:
            passed_on = True
            for pid in set(pids) - set(codes):
                os.kill(pid, signal.SIGTERM)
        if time.monotonic() > deadline:
            for pid in set(pids) - set(codes):
                os.kill(pid, signal.SIGKILL)
            return [codes.get(pid, -9) for pid in pids], True
        time.sleep(0.02)
    return [codes[pid] for pid in pids], False


def make_options(folder: Path) -> dict[str, object]:
    """A short run with caches, previews, validation and saves, so that moments fall into all of them."""
    (folder / "prompts.txt").write_text("a cat --w 64 --h 64 --s 2\n")
    return {
        "max_train_steps": STEPS, "train_batch_size": 1, "cache_latents": True,
        "sample_prompts": folder / "prompts.txt",
        "sample_every_n_steps": 3, "sample_at_first": True, "validation_split": 0.3, "validate_every_n_steps": 2,
        "save_every_n_steps": 3, "save_state": True, "console_log_level": "INFO", "network_train_unet_only": True,
        "save_last_n_steps": 3,
    }  # fmt: skip


def judge(
    moment: Moment, ended: Ended, output: Path, resume: Callable[[Path], Mapping[str, object]], straight: Mapping
) -> str:
    """Empty where all is well: no traceback, no hang, and the resumed run ends like one that was never stopped."""
    if ended.timed_out:
        return "a process hangs"
    messages = "\n".join(ended.messages)
    if "Traceback" in messages:
        return "a traceback: " + messages[-300:]
    stopped = re.findall(r"stopped after step (\d+)", messages)
    if stopped:
        if ended.codes != [0, 0] or not (output / f"lora-step{int(stopped[-1]):08d}-state").is_dir():
            return f"stopped with the exit codes {ended.codes}"
    elif (output / "lora.safetensors").is_file():
        return "" if ended.codes == [0, 0] and equal_tensors(read_weights(output), straight) else "it ended otherwise"
    elif "error: interrupted" not in messages or not set(ended.codes) <= {130, 0, 2}:
        return f"ended with {ended.codes}: {messages[-300:]}"
    elif not list(output.glob("*-state")):
        return ""  # before the first step there is nothing to save
    return "" if equal_tensors(resume(find_newest_state(output)), straight) else "the resumed run differs"


def judge_failure(moment: Moment, ended: Ended, output: Path, straight: Mapping) -> str:
    """Empty where all is well: the other process ends soon, with one line; or the failure was outlived by both."""
    other = 1 - moment.rank
    last = (ended.messages[other].splitlines() or [""])[-1]
    if ended.timed_out:
        return "a process hangs"
    if "Traceback" in ended.messages[other]:
        return "a traceback of the other process: " + ended.messages[other][-300:]
    if ended.codes == [0, 0]:
        return "" if equal_tensors(read_weights(output), straight) else "it ended otherwise"
    if ended.codes[other] == 0:  # the failure came after the last meeting
        return "" if (output / "lora.safetensors").is_file() else "the other process noticed nothing"
    if ended.codes[other] != 2 or not last.startswith("error: "):
        return f"ended with {ended.codes}: {last}"
    return ""


def choose_moment(kind: str, number: int, draw: random.Random, calls: Sequence[Sequence[int]]) -> Moment:
    """A third of them before the first step. calls: of each rank, at its first step and in all."""
    rank = draw.randrange(2)
    first, last = calls[rank]
    call = draw.randint(1, first) if number % 3 == 0 else draw.randint(first, last)
    if kind == "error":
        return Moment(rank=rank, call=call)
    if kind == "kill":
        return Moment(rank=rank, call=call, signal=signal.SIGKILL)
    sent = draw.choice((signal.SIGINT, signal.SIGTERM))
    return Moment(rank=rank, call=call, target=TARGETS[number % len(TARGETS)], signal=sent)


def try_moments(count: int, folder: Path, seed: int = 0, kinds: Sequence[str] = KINDS) -> list[str]:
    """Try random moments of each kind; gives what went wrong at each, empty where nothing did."""
    toy, images = write_toy("sd", folder / "toy"), make_images(folder / "images")
    options = make_options(folder)
    straight = run_pair(make_arguments(toy, images, folder / "straight", **options), folder / "straight-logs")
    assert straight.codes == [0, 0], straight.messages
    weights, draw, faults = read_weights(folder / "straight"), random.Random(seed), []
    for number in range(count * len(kinds)):
        kind = kinds[number % len(kinds)]
        moment = choose_moment(kind, number // len(kinds), draw, straight.calls)
        output = folder / f"out{number}"
        ended = run_pair(make_arguments(toy, images, output, **options), folder / f"logs{number}", moment)

        def resume(state: Path, output: Path = output, number: int = number) -> Mapping[str, object]:
            again = make_arguments(toy, images, output, **options, resume=state)
            done = run_pair(again, folder / f"again{number}")
            assert done.codes == [0, 0], done.messages
            return read_weights(output)

        if kind == "stop":
            faults.append(judge(moment, ended, output, resume, weights))
        else:
            faults.append(judge_failure(moment, ended, output, weights))
        reached = re.findall(r"stopped after step (\d+)", "\n".join(ended.messages))
        where = f"stopped after step {reached[-1]}" if reached else f"exit codes {ended.codes}"
        sys.stdout.write(f"{number + 1:3} {moment}, {where}, {ended.seconds:.1f} s: {faults[-1] or 'ok'}\n")
        sys.stdout.flush()
    return faults


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        wrong = [fault for fault in try_moments(int(sys.argv[1]), Path(place), kinds=sys.argv[2:] or KINDS) if fault]
    sys.stdout.write(f"{len(wrong)} went wrong\n")
    sys.exit(bool(wrong))
