"""Weights shared out over processes: the same training, files and states as in one process, and how such runs end."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import sfumato.train
from sfumato.demo.toy import write_toy
from sfumato.formats.state import load_state
from sfumato.parallel.fsdp import Fsdp
from sfumato.training.run import Run
from toy_runs import make_arguments, make_images, read_metrics, read_weights
from training.stop_moments import Ended, Moment, run_pair, start_ranks, wait_for_all

pytestmark = pytest.mark.full
Toys = Mapping[str, Mapping[str, Path]]
SCRIPTS = {
    ("sd", "adapter"): "train_network",
    ("sdxl", "full"): "sdxl_train",
    ("flux", "adapter"): "flux_train_network",
    ("flux", "full"): "flux_train",
}
BATCH = 4  # of all processes together
# A large eps keeps AdamW from blowing up rounding in gradients that are almost zero.
OPTIONS = {"optimizer_args": "eps=0.01", "max_train_steps": 3}


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Toys:
    return {name: write_toy(name, tmp_path_factory.mktemp(name)) for name in ("sd", "sdxl", "flux")}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where each process says what has its weights, once it has taken its steps."""
    normal, folder = sfumato.train.loop, tmp_path / "engines"
    folder.mkdir()

    def loop(run: Run) -> None:
        normal(run)
        weights = list(run.model.denoiser.parameters())
        facts = {
            "strategy": type(run.parallel).__name__,
            "shards": isinstance(run.parallel, Fsdp) and isinstance(run.model.denoiser, FSDPModule),
            "blocks": sum(isinstance(module, FSDPModule) for module in run.model.denoiser.modules()) - 1,
            "all": sum(weight.numel() for weight in weights),
            "own": sum((w.to_local() if isinstance(w, DTensor) else w).numel() for w in weights),
            "moments": sum(
                value.numel()
                for state in run.optimizer.state.values()
                for name, value in state.items()
                if name == "exp_avg"
            ),
        }
        (folder / f"{run.plan.output_dir.name}-{run.parallel.rank}").write_text(json.dumps(facts))

    monkeypatch.setattr(sfumato.train, "loop", loop)
    return folder


def train_over(
    count: int, what: tuple[str, str], toys: Toys, images: Path, output: Path, **options: Any
) -> tuple[Path, Ended]:
    """Train with a global batch of four. what: family and method."""
    own = {"train_batch_size": BATCH // count, "network_dim": 2 if what[1] == "adapter" else None}
    command = make_arguments(toys[what[0]], images, output, **{**own, **OPTIONS, **options})
    ended = run_pair(command, output / "logs", count=count, script=SCRIPTS[what], counts_calls=False)
    assert ended.codes == [0] * count, ended.messages
    return output, ended


def compare(ours: Path, theirs: Path, *, bound: float = 2e-5, since: int = 0) -> None:
    """Weights and losses are equal up to the order of sums. since: the steps that only `theirs` has taken."""
    own, other = read_weights(ours), read_weights(theirs)
    assert set(own) == set(other)
    for name, weight in own.items():
        assert weight.numel() == other[name].numel() > 0
        torch.testing.assert_close(weight, other[name], rtol=10 * bound, atol=bound)
    losses = [[row["loss/current"] for row in read_metrics(path) if "loss/current" in row] for path in (ours, theirs)]
    assert len(losses[0]) == len(losses[1]) - since > 0
    assert losses[0] == pytest.approx(losses[1][since:], rel=10 * bound)


def read_facts(engines: Path, output: Path, count: int) -> list[dict[str, Any]]:
    return [json.loads((engines / f"{output.name}-{rank}").read_text()) for rank in range(count)]


@pytest.mark.parametrize("what", SCRIPTS, ids="-".join)
def test_two_processes_train_what_one_does_whether_they_share_the_weights_or_have_them_all(
    what: tuple[str, str], toys: Toys, images: Path, tmp_path: Path, engines: Path
) -> None:
    more = {"train_text_encoder": what[0] == "sdxl"}  # which is whole in each, beside what is shared out
    one, _ = train_over(1, what, toys, images, tmp_path / "one", **more)
    two, _ = train_over(2, what, toys, images, tmp_path / "two", fsdp=True, **more)
    whole, _ = train_over(2, what, toys, images, tmp_path / "whole", **more)
    compare(two, one)
    compare(whole, one)
    assert {each["strategy"] for each in read_facts(engines, whole, 2)} == {"AllReduce"}
    facts = read_facts(engines, two, 2)
    assert all(each["shards"] and each["blocks"] > 1 for each in facts)
    assert sum(each["own"] for each in facts) == facts[0]["all"]
    assert all(each["own"] < 0.6 * each["all"] for each in facts)
    if what == ("flux", "full"):  # what the optimizer keeps is shared out, too
        assert [each["moments"] for each in facts] == [each["own"] for each in facts]
    (alone,) = read_facts(engines, one, 1)
    assert alone["strategy"] == "Single"


def test_four_processes_are_two_are_one(toys: Toys, images: Path, tmp_path: Path, engines: Path) -> None:
    """The global batch is the same; each of four has a quarter of the weights, or all of them."""
    what = ("flux", "full")
    one, _ = train_over(1, what, toys, images, tmp_path / "one")
    for count, fsdp in ((2, False), (4, False), (4, True)):
        some, _ = train_over(count, what, toys, images, tmp_path / f"{count}{fsdp}", fsdp=fsdp)
        compare(some, one)
        facts = read_facts(engines, some, count)
        assert {each["strategy"] for each in facts} == {"Fsdp" if fsdp else "AllReduce"}
        assert all((each["own"] < 0.4 * each["all"]) == fsdp for each in facts)


def test_a_state_goes_on_with_any_number_of_processes_and_without_sharing(
    toys: Toys, images: Path, tmp_path: Path
) -> None:
    """Saved after 2 of 4 steps by two processes; EMAs, gradients of two batches and recomputed blocks are in it."""
    what = ("flux", "full")
    options = {"max_train_steps": 4, "ema_decay": 0.9, "gradient_checkpointing": True, "save_state": True}
    straight, _ = train_over(2, what, toys, images, tmp_path / "straight", fsdp=True, save_every_n_steps=2, **options)
    folder = straight / "lora-step00000002-state"
    state, _ = load_state(folder)
    assert all(value.numel() for value in state["weights"].values())
    assert state["optimizer"]["state"]["state"][0]["exp_avg"].shape == next(iter(state["weights"].values())).shape
    for count, fsdp in ((2, True), (1, False), (4, True), (2, False)):
        resumed, _ = train_over(
            count, what, toys, images, tmp_path / f"{count}{fsdp}", fsdp=fsdp, resume=folder, **options
        )
        compare(resumed, straight, since=2)
        if (count, fsdp) == (2, True):
            assert all(
                torch.equal(weight, read_weights(straight)[name]) for name, weight in read_weights(resumed).items()
            )
        averages = [read_weights(path, "lora-ema") for path in (resumed, straight)]
        assert all(torch.allclose(averages[0][name], averages[1][name], atol=1e-6) for name in averages[1])


def test_lower_precision_and_weights_in_main_memory(toys: Toys, images: Path, tmp_path: Path) -> None:
    """Losses in bfloat16 follow those of one process within 1/256, the distance of its neighbors."""
    what, options = ("flux", "full"), {"mixed_precision": "bf16", "gradient_accumulation_steps": 2}
    one, _ = train_over(1, what, toys, images, tmp_path / "one", **options)
    two, _ = train_over(2, what, toys, images, tmp_path / "two", fsdp=True, **options)
    compare(two, one, bound=2**-8 / 10)
    kept, _ = train_over(2, what, toys, images, tmp_path / "kept", fsdp=True, fsdp_offload_params=True, **options)
    assert all(torch.equal(weight, read_weights(two)[name]) for name, weight in read_weights(kept).items())


def test_blocks_that_are_compiled_and_recomputed(toys: Toys, images: Path, tmp_path: Path) -> None:
    what, options = ("flux", "full"), {"max_train_steps": 1}
    one, _ = train_over(1, what, toys, images, tmp_path / "one", **options)
    more = {"gradient_checkpointing": True, "compile": True, "compile_backend": "aot_eager"}
    two, _ = train_over(2, what, toys, images, tmp_path / "two", fsdp=True, **more, **options)
    compare(two, one)


def read_previews(output: Path) -> dict[str, np.ndarray]:
    """Label and prompt -> pixels."""
    found: dict[str, np.ndarray] = {}
    for path in sorted((output / "sample").glob("*.png")):
        with Image.open(path) as image:
            key = f"{path.stem.split('_')[1]} {image.info['prompt']}"
            assert key not in found
            found[key] = np.asarray(image)
    return found


def test_previews_and_validation_are_those_of_one_process(toys: Toys, images: Path, tmp_path: Path) -> None:
    """Three prompts for two processes; one prompt has other steps, so that both make its image."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"{text} --w 64 --h 64 --s {s}\n" for text, s in (("cat", 2), ("dog", 3), ("cup", 3))))
    options = {"sample_prompts": prompts, "sample_every_n_steps": 2, "ema_decay": 0.9, "max_train_steps": 2}
    options |= {"validation_split": 0.3, "validate_every_n_steps": 2}
    what = ("flux", "full")
    one, _ = train_over(1, what, toys, images, tmp_path / "one", **options)
    two, _ = train_over(2, what, toys, images, tmp_path / "two", fsdp=True, **options)
    ours, theirs = read_previews(two), read_previews(one)
    assert set(ours) == set(theirs)
    assert len(ours) == 3
    for name, pixels in ours.items():
        assert np.abs(pixels.astype(int) - theirs[name]).max() <= 1, name
    validation = [
        [row["loss/validation/step_average"] for row in read_metrics(path) if "loss/validation/step_average" in row]
        for path in (two, one)
    ]
    assert len(validation[0]) == 2
    assert validation[0] == pytest.approx(validation[1], rel=1e-5)


def find_unfinished(output: Path) -> list[str]:
    """What a save that was not finished would leave."""
    return [path.name for path in output.rglob("*") if path.name.endswith(".tmp") or path.name.startswith(".lora")]


def start_run(toys: Toys, images: Path, output: Path, engine: str = "fsdp", **options: Any) -> list[int]:
    own = {"network_dim": None, "train_batch_size": 2, engine: True, "save_every_n_steps": 1, "save_state": True}
    command = make_arguments(toys["flux"], images, output, **{**own, **OPTIONS, **options})
    return start_ranks(["flux_train", *command], output / "logs", count=2, counts_calls=False)


def wait_for_steps(output: Path, count: int) -> None:
    for _ in range(2400):
        if sum(path.suffix != ".tmp" for path in output.glob("*-state")) >= count:
            return
        time.sleep(0.05)
    raise AssertionError("no step was taken")


def read_messages(output: Path, ranks: Sequence[int] = (0, 1)) -> list[str]:
    return [(output / "logs" / f"rank{rank}.log").read_text() for rank in ranks]


@pytest.mark.parametrize(("engine", "rank"), [("fsdp", 0), ("fsdp", 1), ("deepspeed", 1)])
def test_where_one_process_is_killed_the_other_says_so_and_the_last_state_goes_on(
    engine: str, rank: int, toys: Toys, images: Path, tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed" if engine == "deepspeed" else "torch")
    output = tmp_path / "out"
    pids = start_run(toys, images, output, engine, max_train_steps=1000, save_last_n_steps=3)
    wait_for_steps(output, 2)
    os.kill(pids[rank], signal.SIGKILL)
    codes, timed_out = wait_for_all(pids, end_others=False)
    assert not timed_out
    assert (codes[rank], codes[1 - rank]) == (-signal.SIGKILL, 2)
    (told,) = read_messages(output, [1 - rank])
    assert "Traceback" not in told
    assert told.splitlines()[-1].startswith(("error: process", "error: another process"))
    if rank:  # the process that writes lived on
        assert not find_unfinished(output)
    state, _ = load_state(max(output.glob("*-state")))
    what, steps = ("flux", "full"), state["counters"]["step"] + 1
    resumed, _ = train_over(1, what, toys, images, output, resume=output, max_train_steps=steps)
    straight = read_weights(train_over(1, what, toys, images, tmp_path / "straight", max_train_steps=steps)[0])
    for name, weight in read_weights(resumed).items():
        torch.testing.assert_close(weight, straight[name], rtol=1e-3, atol=1e-4)


def test_a_process_that_starts_late_and_one_that_is_stopped_for_a_while_are_waited_for(
    toys: Toys, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = sfumato.parallel.start.choose_device
    monkeypatch.setattr(
        "sfumato.parallel.start.choose_device", lambda rank=None: (time.sleep(2 * (rank or 0)), choose(rank))[1]
    )
    output = tmp_path / "out"
    pids = start_run(toys, images, output, max_train_steps=4)
    wait_for_steps(output, 1)
    os.kill(pids[1], signal.SIGSTOP)
    time.sleep(2)
    os.kill(pids[1], signal.SIGCONT)
    codes, timed_out = wait_for_all(pids, end_others=True)
    assert (codes, timed_out) == ([0, 0], False), read_messages(output)
    one, _ = train_over(1, ("flux", "full"), toys, images, tmp_path / "one", max_train_steps=4)
    compare(output, one)
    assert not find_unfinished(output)


def test_an_error_in_one_process_ends_the_other(toys: Toys, images: Path, tmp_path: Path) -> None:
    command = make_arguments(
        toys["flux"], images, tmp_path / "out", network_dim=None, train_batch_size=2, fsdp=True, **OPTIONS
    )
    calls = run_pair(command, tmp_path / "straight", script="flux_train").calls[1]
    moment = Moment(rank=1, call=(calls[0] + calls[1]) // 2)
    ended = run_pair(command, tmp_path / "logs", moment, script="flux_train")
    assert not ended.timed_out
    assert ended.codes[0] == 2, ended.messages
    assert ended.messages[0].splitlines()[-1].startswith(("error: process", "error: another process"))
    assert "Traceback" not in ended.messages[0]
