"""DeepSpeed's engine in two processes, on the CPU: the losses and files of one process with the same global batch."""

from __future__ import annotations

import os
import signal
import socket
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from families.toys import ToyShelf
from sfumato.cli.main import main
from sfumato.errors import UserError
from sfumato.methods.sharing_rules import ENGINES, SHARING_RULES, format_sharing_table
from sfumato.parallel.zero import ZeroEngine, build_disk_access
from sfumato.training.micro_batch import compute_loss
from toy_runs import make_arguments, make_images, read_metrics, read_weights, train_toy

os.environ.setdefault("DS_ACCELERATOR", "cpu")
OPTIMIZERS = {1: "DeepSpeedZeroOptimizer", 2: "DeepSpeedZeroOptimizer", 3: "DeepSpeedZeroOptimizer_Stage3"}
COMMON = {"max_train_steps": 3, "optimizer_args": "eps=0.01", "cache_latents": True}  # eps: for tiny gradients
LORA = {"network_train_unet_only": True}
FULL = {"method": "full", "network_dim": None}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), 8)


def train_both(
    toy: Any, images: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, *, stage: int, **options: Any
) -> Path:
    """Two processes, of which each writes which engine it had, and how many numbers its optimizer stepped."""
    step = ZeroEngine.step

    def step_and_tell(self: ZeroEngine) -> tuple[float, bool]:
        zero = self.engine.optimizer
        own, trained = sum(flat.numel() for flat in self.state._list_flat()), count_trained(self)
        (folder / f"engine{os.environ['RANK']}").write_text(f"{type(zero).__name__} {own} {trained}")
        return step(self)

    monkeypatch.setattr(ZeroEngine, "step", step_and_tell)
    command = make_arguments(
        toy, images, folder / "both", train_batch_size=1, deepspeed=True, zero_stage=stage, **COMMON | options
    )
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = [fork_rank(rank, port, folder / f"log{rank}", command) for rank in range(2)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert codes == [0, 0], [(folder / f"log{rank}").read_text()[-3000:] for rank in range(2)]
    for rank in range(2):
        name, own, trained = (folder / f"engine{rank}").read_text().split()
        assert name == OPTIMIZERS[stage]
        assert int(trained) / 2 <= int(own) < int(trained) * 0.55 + 1000  # its half, filled up
    return folder / "both"


def fork_rank(rank: int, port: int, log: Path, command: list[str]) -> int:
    """One process of a run, forked from this one, which has imported everything already. Gives its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for descriptor in (1, 2):
            os.dup2(file, descriptor)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        signal.alarm(300)
        code = main(["train", "--debug", *command])
    finally:
        os._exit(code)


def count_trained(engine: Any) -> int:
    return sum(torch.Size(vars(p).get("ds_shape", p.shape)).numel() for p in engine.state.parameters)


def check_equal(ours: Path, theirs: Path, *, loss: float, weight: float) -> None:
    """The same keys and shapes; losses and weights within a bound."""
    found, expected = read_weights(ours), read_weights(theirs)
    assert {name: tensor.shape for name, tensor in found.items()} == {n: tensor.shape for n, tensor in expected.items()}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.float(), expected[name].float(), rtol=1e-3, atol=weight)
    pairs = zip(read_metrics(theirs), read_metrics(ours), strict=True)
    assert all(abs(one["loss/current"] - two["loss/current"]) < loss for one, two in pairs)
    pairs = zip(read_metrics(theirs), read_metrics(ours), strict=True)
    assert all(two["grad_norm"] == pytest.approx(one["grad_norm"], rel=0.05) for one, two in pairs)


@pytest.mark.full
@pytest.mark.parametrize(
    ("family", "options", "stage"),
    [(family, options, stage) for family in ("sd", "flux") for options in (LORA, FULL) for stage in (1, 2, 3)],
    ids=lambda value: value.get("method", "lora") if isinstance(value, dict) else str(value),
)
def test_two_processes_train_what_one_does(
    toy_shelf: ToyShelf,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    options: dict[str, Any],
    stage: int,
) -> None:
    pytest.importorskip("deepspeed")
    toy = toy_shelf.paths(family)
    alone = train_toy(toy, images, tmp_path / "alone", train_batch_size=2, **COMMON | options)
    both = train_both(toy, images, tmp_path, monkeypatch, stage=stage, **options)
    check_equal(both, alone, loss=1e-4, weight=2e-5)


@pytest.mark.full
@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_full_training_in_bf16(
    toy_shelf: ToyShelf, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Losses follow those of one process within what bf16 resolves, 2 ** -8; what is saved is complete."""
    pytest.importorskip("deepspeed")
    toy, options = toy_shelf.paths(family), FULL | {"mixed_precision": "bf16", "cache_text_encoder_outputs": True}
    alone = train_toy(toy, images, tmp_path / "alone", train_batch_size=2, **COMMON | options)
    both = train_both(toy, images, tmp_path, monkeypatch, stage=2, **options)
    check_equal(both, alone, loss=2**-6, weight=2e-3)


@pytest.mark.full
def test_state_and_weights_in_main_memory(
    toy_shelf: ToyShelf, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("deepspeed")
    toy = toy_shelf.paths("sd")
    alone = train_toy(toy, images, tmp_path / "alone", train_batch_size=2, **COMMON | FULL)
    offload = {"offload_optimizer_device": "cpu", "offload_param_device": "cpu"}
    both = train_both(toy, images, tmp_path, monkeypatch, stage=3, **FULL | offload)
    check_equal(both, alone, loss=1e-4, weight=2e-5)


def test_a_disk_that_deepspeed_has_no_access_to_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    deepspeed = pytest.importorskip("deepspeed")
    builder = type(deepspeed.accelerator.get_accelerator().create_op_builder("AsyncIOBuilder"))
    monkeypatch.setattr(builder, "is_compatible", lambda self, verbose=False: False)  # as without libaio
    monkeypatch.setattr(builder, "load", lambda self, verbose=False: self.jit_load(verbose))
    with pytest.raises(UserError, match="libaio-dev") as raised:
        build_disk_access()
    assert raised.value.code == "deepspeed-nvme-unavailable"


@pytest.mark.full
@pytest.mark.parametrize(("stage", "precision"), [(2, "no"), (3, "bf16")])
def test_a_step_that_is_not_finite_in_one_process_is_skipped_by_all(
    toy_shelf: ToyShelf, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int, precision: str
) -> None:
    """The second of three, of the last process, without clipping, which would look at the norm anyway."""
    pytest.importorskip("deepspeed")
    toy, calls = toy_shelf.paths("sd"), count()

    def compute_loss_or_nan(*given: Any) -> torch.Tensor:
        spoils = next(calls) == 1 and os.environ.get("RANK", "1") == "1"
        return compute_loss(*given) * (float("nan") if spoils else 1.0)

    monkeypatch.setattr("sfumato.train.compute_loss", compute_loss_or_nan)
    options = LORA | {"max_grad_norm": 0, "mixed_precision": precision}
    both = train_both(toy, images, tmp_path, monkeypatch, stage=stage, **options)
    calls = count()
    alone = train_toy(toy, images, tmp_path / "alone", train_batch_size=2, **COMMON | options)
    assert [row["loss/current"] is None for row in read_metrics(both)] == [False, True, False]
    found, expected = read_weights(both), read_weights(alone)
    for name, tensor in found.items():
        torch.testing.assert_close(
            tensor.float(), expected[name].float(), rtol=1e-3, atol=2e-5 if precision == "no" else 2e-3
        )


@pytest.mark.full
def test_a_state_is_that_of_every_strategy(
    toy_shelf: ToyShelf, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes with parts of all weights save it, one goes on, and the other way round."""
    pytest.importorskip("deepspeed")
    toy = toy_shelf.paths("sd")
    straight = train_toy(toy, images, tmp_path / "straight", train_batch_size=2, **COMMON | FULL)
    saving = {"save_every_n_steps": 2, "save_state": True}
    train_both(toy, images, tmp_path / "a", monkeypatch, stage=3, **FULL, **saving)
    state = tmp_path / "a" / "both" / "lora-step00000002-state"
    alone = train_toy(toy, images, tmp_path / "alone", train_batch_size=2, resume=state, **COMMON | FULL)
    check_last_equal(alone, straight)
    train_toy(toy, images, tmp_path / "one", train_batch_size=2, **COMMON | FULL | saving)
    state = tmp_path / "one" / "lora-step00000002-state"
    both = train_both(toy, images, tmp_path / "b", monkeypatch, stage=3, resume=state, **FULL)
    check_last_equal(both, straight)


def check_last_equal(ours: Path, straight: Path) -> None:
    """The last loss, and what is saved at the end."""
    assert read_metrics(ours)[-1]["loss/current"] == pytest.approx(read_metrics(straight)[-1]["loss/current"], abs=1e-4)
    found, expected = read_weights(ours), read_weights(straight)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=2e-5)


def test_the_table_names_the_engines_of_each_rule() -> None:
    _, _, *rows = format_sharing_table()
    for rule, row in zip(SHARING_RULES, rows, strict=True):
        named = row.split("|")[2].strip()
        assert all((engine in named or named == "any") == (engine in rule.engines) for engine in ENGINES)
    assert len(rows) == len(SHARING_RULES) == len({rule.code for rule in SHARING_RULES})
    assert all(set(rule.engines) <= set(ENGINES) and rule.engines for rule in SHARING_RULES)
