"""A rehearsal goes through a run's own code: its memory is that of the networks, and faults of a GPU run are seen."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from data.test_batch_sampler import make_plan
from families.toys import ToyShelf
from rehearsing import needs_rehearsal
from sfumato.adapters.base import Adapter
from sfumato.adapters.lora import LoRA
from sfumato.cli.main import main
from sfumato.config import load_config
from sfumato.families.base import Family
from sfumato.memory.rehearsal.meter import LiveTensor
from sfumato.methods.adapter import AdapterMethod
from sfumato.plan import RunPlan, make_run_plan
from sfumato.tools.rehearsal_data import keep_largest_batches
from sfumato.tools.rehearsal_stages import STEP, Stage, format_stages
from sfumato.tools.rehearse import ALLOWANCE, describe_fit, rehearse_plan
from sfumato.training import validation
from sfumato.training.run import Run
from toy_runs import make_arguments, make_images

# The others take longer: what they do differently is rehearsed in the full tier.
FAMILIES = ("flux", *(pytest.param(name, marks=pytest.mark.full) for name in ("sd", "sdxl", "sd3", "chroma", "lumina")))
CACHED = {"cache_latents": True, "cache_text_encoder_outputs": True, "network_train_unet_only": True}
FULL = {"method": "full", "network_dim": None, "learning_rate": "1e-4", "cache_latents": True}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data"))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat --w 64 --h 64 --s 4")
    return path


def plan_toy(toy_shelf: ToyShelf, family: str, images: Path, output: Path, **options: Any) -> RunPlan:
    argv = make_arguments(toy_shelf.paths(family), images, output, **options)
    return make_run_plan(load_config(argv), processes=1)


def find_stage(stages: list[Stage], name: str) -> Stage:
    return next(stage for stage in stages if stage.name == name)


def count_bytes(plan: RunPlan, part: str, itemsize: int) -> int:
    """Of the network's tensors, from the file's header."""
    network = plan.blueprint.networks[part]
    return sum(shape.numel() * itemsize for shape in network.weights.read_shapes().values())


@needs_rehearsal
class TestStages:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_an_adapter(self, toy_shelf, images, prompts, tmp_path, family):
        """Every stage runs, nothing is on two devices, and the step waits nowhere."""
        options = CACHED | {"sample_prompts": prompts, "sample_every_n_steps": 1, "validation_split": 0.5}
        options |= {"gradient_checkpointing": True, "mixed_precision": "bf16"}
        plan = plan_toy(toy_shelf, family, images, tmp_path / "out", **options)
        stages = rehearse_plan(plan)
        assert [stage.name for stage in stages] == [
            *[f"caching of {part}" for part in ("vae", *plan.blueprint.text_parts)],
            *["loading", STEP, "preview", "validation", "save"],
        ]
        for part in ("vae", *plan.blueprint.text_parts):  # no two networks at a time
            assert set(find_stage(stages, f"caching of {part}").resident) == {part}
        step = find_stage(stages, STEP)
        assert not step.waits
        assert set(step.resident) == {"denoiser", "trained", "optimizer"}
        adapters = sum(part.parameters for part in plan.parts)
        assert step.resident["trained"] == 4 * adapters
        assert 8 * adapters <= step.resident["optimizer"] <= 8 * adapters + 4 * 2 * sum(p.modules for p in plan.parts)
        assert step.resident["denoiser"] >= count_bytes(plan, "denoiser", 2)
        assert step.peak > sum(step.resident.values()) + 4 * adapters  # gradients
        assert not (tmp_path / "out").exists()

    @pytest.mark.full
    @pytest.mark.parametrize("family", ["sd", "sd3", "chroma"])  # the others: test_fit.py, against the bound
    def test_the_full_model(self, toy_shelf, images, tmp_path, family):
        """Float32 weights, their gradients and two moments are on the device at the peak."""
        plan = plan_toy(toy_shelf, family, images, tmp_path / "out", **FULL, mixed_precision="bf16")
        step = find_stage(rehearse_plan(plan), STEP)
        trained = 4 * sum(part.parameters for part in plan.parts)
        assert step.resident["denoiser"] >= trained
        assert step.resident["optimizer"] >= 2 * trained
        assert step.peak >= 4 * trained

    @pytest.mark.full
    def test_live_text_and_latents(self, toy_shelf, images, tmp_path):
        """Without caches everything stays on the device, and the step encodes."""
        plan = plan_toy(toy_shelf, "flux", images, tmp_path / "out", train_batch_size=2)
        step = find_stage(rehearse_plan(plan), STEP)
        assert {"denoiser", "clip_l", "t5", "vae"} < set(step.resident)
        assert step.resident["t5"] == count_bytes(plan, "t5", 4)

    @pytest.mark.full
    @pytest.mark.parametrize(
        "options",
        [
            CACHED | {"mixed_precision": "fp16"},
            FULL | {"mixed_precision": "bf16", "full_bf16": True, "cache_text_encoder_outputs": True},
            CACHED | {"optimizer_type": "Prodigy"},
            CACHED | {"ema_decay": 0.99, "gradient_accumulation_steps": 2},
            CACHED | {"compile": True, "compile_backend": "aot_eager"},
        ],
        ids=["fp16", "full_bf16", "Prodigy", "ema", "compile"],
    )
    def test_other_steps(self, toy_shelf, images, tmp_path, options):
        """What makes its state otherwise: a scaler, stochastic rounding, an optimizer that asks the device, EMA.

        And what a rehearsal leaves out: compiling.
        """
        plan = plan_toy(toy_shelf, "flux", images, tmp_path / "out", **options)
        step = find_stage(rehearse_plan(plan), STEP)
        assert step.resident["optimizer"] >= 2 * sum(part.parameters for part in plan.parts)
        waits = {wait.place.partition(":")[0] for wait in step.waits}
        assert waits == ({"optim/skipping.py"} if "optimizer_type" in options else set())

    @pytest.mark.full
    def test_accumulated_gradients_count(self, toy_shelf, images, tmp_path):
        """They are there during the forward of the second batch; a third one needs no more."""
        peaks: list[int] = []
        for accumulation in (1, 2, 3):
            options = FULL | {"cache_text_encoder_outputs": True, "gradient_accumulation_steps": accumulation}
            plan = plan_toy(toy_shelf, "flux", images, tmp_path / str(accumulation), **options)
            peaks.append(find_stage(rehearse_plan(plan), STEP).peak)
        assert peaks[0] < peaks[1] == peaks[2]

    @pytest.mark.full
    def test_checkpointing_needs_less(self, toy_shelf, images, tmp_path):
        peaks: list[int] = []
        for checkpointing in (False, True):
            options = CACHED | {"gradient_checkpointing": checkpointing}
            plan = plan_toy(toy_shelf, "flux", images, tmp_path / str(checkpointing), **options)
            peaks.append(find_stage(rehearse_plan(plan), STEP).peak)
        assert peaks[1] < peaks[0]

    @pytest.mark.full
    def test_planted_waits_are_seen(self, toy_shelf, images, prompts, tmp_path, monkeypatch):
        options = CACHED | {"sample_prompts": prompts, "sample_every_n_steps": 1, "validation_split": 0.5}
        plan = plan_toy(toy_shelf, "flux", images, tmp_path / "out", **options)
        predict, write, after_step = AdapterMethod.predict, AdapterMethod.write, AdapterMethod.after_step

        def predict_and_wait(self: AdapterMethod, model: Family, noisy: Tensor, *rest: Any) -> Tensor:
            noisy.mean().item()
            return predict(self, model, noisy, *rest)

        def write_and_wait(self: AdapterMethod, model: Family, *rest: Any) -> None:
            next(iter(self.modules.parameters())).sum().item()
            write(self, model, *rest)

        def wait_after_step(self: AdapterMethod) -> Any:
            assert float(next(iter(self.modules.parameters())).grad.sum()) == 1
            return after_step(self)

        monkeypatch.setattr(AdapterMethod, "after_step", wait_after_step)
        monkeypatch.setattr(AdapterMethod, "predict", predict_and_wait)
        monkeypatch.setattr(AdapterMethod, "write", write_and_wait)
        stages = rehearse_plan(plan)
        for name in (STEP, "preview", "validation", "save"):
            seen = [wait for wait in find_stage(stages, name).waits if "test_rehearse.py" in wait.place]
            places = 2 if name == STEP else 1
            assert [wait.reason for wait in seen] == ["reads a value of a float32 tensor"] * places, name

    @pytest.mark.full
    @pytest.mark.parametrize("part", ["predict", "decode_latents", "gradient", "validation", "save"])
    def test_a_misplaced_tensor_is_an_error(self, toy_shelf, images, prompts, tmp_path, monkeypatch, part):
        options = CACHED | {"sample_prompts": prompts, "sample_every_n_steps": 1, "validation_split": 0.5}
        plan = plan_toy(toy_shelf, "flux", images, tmp_path / "out", **options)
        condition, decode, measure = Family.predict, Family.decode, validation.fill_validation_table

        def misplaced(model: Family, noisy: Tensor, *rest: Any) -> Tensor:
            return condition(model, noisy, *rest) + torch.zeros(noisy.shape)

        def misplaced_image(model: Family, latents: Tensor) -> Tensor:
            return decode(model, latents + torch.ones(latents.shape))

        def misplaced_table(run: Run, times: list[int], table: Tensor) -> None:
            measure(run, times, table)
            table += torch.zeros(table.shape)

        def misplaced_gradient(self: AdapterMethod) -> dict[str, Tensor]:
            gradient = next(iter(self.modules.parameters())).grad
            assert gradient is not None
            return {"gradient": (gradient * torch.ones(gradient.shape)).sum()}

        def misplaced_export(adapter: Adapter) -> dict[str, Tensor]:
            return {name: tensor + torch.zeros(tensor.shape) for name, tensor in adapter.named_parameters()}

        planted = {
            "predict": (Family, "predict", misplaced),
            "save": (LoRA, "export_tensors", misplaced_export),
            "decode_latents": (Family, "decode", misplaced_image),
            "gradient": (AdapterMethod, "after_step", misplaced_gradient),
            "validation": (validation, "fill_validation_table", misplaced_table),
        }
        monkeypatch.setattr(*planted[part])
        with pytest.raises(RuntimeError, match=r"on the (same|expected) device"):
            rehearse_plan(plan)


def test_the_largest_batch():
    """Of the bucket whose fullest batch has most pixels: with few images that need not be the largest bucket."""
    data = make_plan([[(1, 5), (3, 1)], [(2, 2)]], batch_size=4)
    sizes = {size: min(count, 4) * size[0] * size[1] for size, count in data.datasets[0].buckets.items()}
    kept = keep_largest_batches(data, accumulation=1)
    assert len(kept.datasets) == 1
    ((size, count),) = kept.buckets.items()
    assert (count, count * size[0] * size[1]) == (4, max(sizes.values()))
    repeated = [subset.repeats for subset in kept.datasets[0].subsets]
    assert sum(map(sum, repeated)) == 4


def test_batches_of_a_step():
    """Two show what accumulation needs; a bucket that is smaller than a batch makes no larger ones."""
    data = make_plan([[(3, 1)]], batch_size=8)
    for accumulation, batches in ((1, 1), (2, 2), (5, 2)):
        kept = keep_largest_batches(data, accumulation=accumulation)
        assert list(kept.buckets.values()) == [3 * batches]
        assert kept.datasets[0].count_batches(processes=1) == batches


def make_stages() -> Iterator[Stage]:
    tensor = LiveTensor(2_000_000_000, "bfloat16", (1000, 1000, 1000), "denoiser.proj")
    for name, peak in (("loading", 7_000_000_000), (STEP, 9_000_000_000)):
        yield Stage(name=name, peak=peak, resident={"denoiser": 5_000_000_000}, largest=(tensor,), waits=())


def test_what_fits_a_card():
    stages = list(make_stages())
    assert len(list(describe_fit(stages, 9_000_000_000 + ALLOWANCE))) == 2
    _, line = describe_fit(stages, 9_000_000_000 + ALLOWANCE)
    assert "every stage fits" in line
    _, line = describe_fit(stages, 9_000_000_000 + ALLOWANCE - 500_000_000)
    assert STEP in line
    assert "0.50 GB too much" in line


def test_the_table():
    lines = list(format_stages(list(make_stages())))
    assert lines[1].split() == ["loading", "7.00", "denoiser", "5.00"]
    assert lines[2].split() == ["2.00", "denoiser.proj:", "1000", "x", "1000", "x", "1000", "bfloat16"]


@needs_rehearsal
def test_the_command(toy_shelf, tmp_path, capsys):
    """Nothing is written but the file of --json: no cache, and no record of masks, of which a run keeps one there."""
    images, cache = make_images(tmp_path / "data"), tmp_path / "cache"
    path = images / "2_cat" / "0.png"
    Image.open(path).convert("RGBA").save(path)
    options = CACHED | {"alpha_mask": True, "cache_latents_to_disk": True, "cache_dir": cache}
    argv = make_arguments(toy_shelf.paths("flux"), images, tmp_path / "out", **options)
    path = tmp_path / "stages.json"
    assert main(["plan", *argv, "--rehearse", "--device", "8GB", "--json", str(path)]) == 0
    stages = json.loads(path.read_text())["stages"]
    caching = ["caching of vae", "caching of clip_l", "caching of t5"]
    assert [stage["stage"] for stage in stages] == [*caching, "loading", STEP, "save"]
    assert all(stage["peak"] >= sum(stage["resident"].values()) > 0 for stage in stages)
    assert "every stage fits" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert not cache.exists()


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["--published", "flux-dev"], "plan-option-without-rehearse"),
        (["--device", "8GB"], "plan-option-without-rehearse"),
        (["--json", "x.json"], "plan-option-without-rehearse"),
        (["--rehearse", "--published", "flux-deb"], "published-model-unknown"),
        (["--rehearse", "--device", "none"], "option-value-malformed"),
        (["--rehearse", "--published", "sd15", "--output_config"], "published-output-config"),
    ],
)
def test_faults(codes, argv, code):
    assert main(["plan", *argv]) == 2
    assert code in codes


@pytest.mark.parametrize(("rank", "expected"), [("0", 2), ("1", 0)])
def test_a_launched_rehearsal_is_refused_once(codes, monkeypatch, rank, expected):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    assert main(["plan", "--rehearse", "--published", "sd15"]) == expected
    assert ("rehearsal-launched" in codes) == (expected == 2)


@needs_rehearsal
@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "size", "published"),
    [("chroma", 512, 17.7), ("sdxl", 1024, 6.5)],
)
def test_peaks_of_published_runs(tmp_path, name, size, published):
    """Within a tenth of what another trainer's table gives in GiB on a card, every block checkpointed."""
    path = tmp_path / "stages.json"
    argv = ["plan", "--rehearse", "--published", name, "--resolution", str(size), "--json", str(path)]
    argv += ["--network_dim", "16", "--mixed_precision", "bf16", "--gradient_checkpointing"]
    assert main([*argv, *(f"--{option}" for option in CACHED)]) == 0
    step = next(stage for stage in json.loads(path.read_text())["stages"] if stage["stage"] == STEP)
    assert step["peak"] / 2**30 == pytest.approx(published, rel=0.1)


@needs_rehearsal
@pytest.mark.full
def test_flux_dev_at_1024(tmp_path):
    """23.80 GB of weights; a naive adapter by hooks needed 26.5 GB for forward and backward.

    The page has the same numbers.
    """
    path = tmp_path / "stages.json"
    argv = ["plan", "--rehearse", "--published", "flux-dev", "--json", str(path), "--network_dim", "16"]
    argv += ["--mixed_precision", "bf16", "--gradient_checkpointing"]
    assert main([*argv, *(f"--{option}" for option in CACHED)]) == 0
    peaks = {stage["stage"]: stage["peak"] for stage in json.loads(path.read_text())["stages"]}
    caching = max(peak for stage, peak in peaks.items() if "caching" in stage)
    assert 9.5e9 < caching < 11e9
    assert 24.5e9 < peaks[STEP] < 27.5e9
    row = read_page("flux-dev")
    assert row["caching, 1024"] == pytest.approx(caching / 1e9, abs=0.06)
    assert row["LoRA, 1024, checkpointed"] == pytest.approx(peaks[STEP] / 1e9, abs=0.06)


def read_page(model: str) -> dict[str, float]:
    """A model's row in docs/performance.md: column -> GB."""
    page = (Path(__file__).parents[2] / "docs" / "performance.md").read_text()
    head = next(line for line in page.splitlines() if line.startswith("| Model"))
    row = next(line for line in page.splitlines() if f"`{model}`" in line and line.startswith("|"))
    names, cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in (head, row))
    return {name: float(cell.split()[0]) for name, cell in zip(names[1:], cells[1:], strict=True)}
