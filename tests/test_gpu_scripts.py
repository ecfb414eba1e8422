"""The GPU tests and benchmark, tried without a GPU: the CPU stands for both devices, toys for published sizes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from families.toys import ToyShelf
from gpu import device_runs, test_attention, test_memory_options, test_parity, test_step, test_whole_run
from gpu.device_runs import BOUNDS, CPU, FAMILIES, StepFacts, load_benchmark, take_first_step
from toy_runs import make_images

# One family here; of the others the full tier tries what is particular to a family.
SOME_FAMILIES = [name if name == "flux" else pytest.param(name, marks=pytest.mark.full) for name in FAMILIES]
BENCHMARK = load_benchmark()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), 3)


@pytest.fixture
def facts() -> dict[str, Any]:
    """What a test records."""
    return {}


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_one_device_is_equal_to_itself(
    family: str, toy_shelf: ToyShelf, images: Path, tmp_path: Path, facts: dict[str, Any]
) -> None:
    test_parity.test_loss_and_gradients(family, "no", toy_shelf, images, tmp_path, CPU, facts.update)
    assert facts["loss"] == facts["gradient"] == 0


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
def test_bounds_of_bfloat16_are_those_of_its_rounding(
    family: str, toy_shelf: ToyShelf, images: Path, tmp_path: Path
) -> None:
    """It is within them of float32, and beyond those of float32.

    Latents are the same, and so is the guidance, which diffusers rounds before its sines: 3.5 would be 3.504.
    """
    toy, options = toy_shelf.paths(family), {"no_half_vae": True, "guidance_scale": 1 if family == "flux" else None}
    exact = take_first_step(CPU, toy, images, tmp_path / "exact", **options)
    found = take_first_step(CPU, toy, images, tmp_path / "rounded", **options, mixed_precision="bf16").compare(exact)
    assert BOUNDS["no"].gradient < found.gradient <= BOUNDS["bf16"].gradient
    assert BOUNDS["no"].loss < found.loss <= BOUNDS["bf16"].loss


@pytest.mark.full
def test_attention_by_the_formula_is_torchs(
    toy_shelf: ToyShelf, images: Path, tmp_path: Path, facts: dict[str, Any]
) -> None:
    test_attention.test_a_step_is_the_same("sd3", "math", toy_shelf, images, tmp_path, CPU, facts.update)
    assert facts["gradient"] < BOUNDS["bf16"].gradient


@pytest.mark.full
@pytest.mark.parametrize("name", test_memory_options.OPTIONS)
def test_memory_options_change_nothing(
    name: str, toy_shelf: ToyShelf, images: Path, tmp_path: Path, facts: dict[str, Any]
) -> None:
    test_memory_options.test_the_same_is_trained("flux", name, toy_shelf, images, tmp_path, CPU, facts.update)
    assert facts["weights"] == 0


def test_distances_are_relative_to_the_size_of_all_gradients() -> None:
    first = StepFacts(loss=1.1, gradients={"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([0.0])})
    second = StepFacts(loss=1.0, gradients={"a": torch.tensor([3.0, 0.5]), "b": torch.tensor([4.0])})
    found = first.compare(second)
    assert found.loss == pytest.approx(0.1)
    assert found.gradient == pytest.approx(((0.5**2 + 4**2) / (3**2 + 0.5**2 + 4**2)) ** 0.5)


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
def test_recomputation(family: str, toy_shelf: ToyShelf, images: Path, tmp_path: Path, facts: dict[str, Any]) -> None:
    test_parity.test_recomputation_changes_nothing(family, toy_shelf, images, tmp_path, CPU, facts.update)


@pytest.mark.full
@pytest.mark.parametrize("options", [{**device_runs.CACHED, **test_step.LORA}, test_step.FULL])
@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_steady_steps(
    family: str, options: dict[str, Any], toy_shelf: ToyShelf, images: Path, tmp_path: Path, facts: dict[str, Any]
) -> None:
    test_step.test_a_steady_step_waits_nowhere(family, options, toy_shelf, images, tmp_path, CPU, facts.update)
    assert facts["enqueued_s"] > 0


@pytest.mark.full
def test_compiled_blocks(
    toy_shelf: ToyShelf, tmp_path: Path, facts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one size: graphs for several take most of the time, and tests/memory has them."""
    images = make_images(tmp_path / "images", 1)
    monkeypatch.setitem(test_step.COMPILED, "compile_backend", "aot_eager")
    test_step.test_compiled_blocks("flux", toy_shelf, images, tmp_path, CPU, facts.update)
    assert facts["graphs"] == facts["graphs_after_first_steps"]


@pytest.mark.full
@pytest.mark.parametrize("family", ["sd", "flux"])
def test_whole_runs(family: str, toy_shelf: ToyShelf, images: Path, tmp_path: Path, facts: dict[str, Any]) -> None:
    test_whole_run.test_previews_saves_and_resume(family, toy_shelf, images, tmp_path, CPU, facts.update)
    assert facts["weights"] == facts["resumed"] == facts["preview_levels"] == 0


class TestBenchmark:
    @pytest.mark.parametrize("family", SOME_FAMILIES)
    def test_a_row_is_measured(self, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(BENCHMARK, "WARM_UP", 1)
        options = {"resolution": 128, "max_bucket_reso": 256, "apply_t5_attn_mask": family == "chroma"}
        row = replace(BENCHMARK.TOY, model=family, options=options)
        result = BENCHMARK.run_row(row, CPU, steps=1)
        assert result["outcome"] == "measured"
        assert result["loss"] > 0
        assert result["images_per_second"] == pytest.approx(1 / result["seconds_per_step"])
        assert json.loads(json.dumps(result)) == result

    @pytest.mark.full
    @pytest.mark.parametrize("recomputed", [False, True])
    def test_a_compiled_row_is_measured(self, recomputed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its arithmetic is that of the plain row."""
        monkeypatch.setattr(BENCHMARK, "WARM_UP", 1)
        sizes = {"resolution": 128, "max_bucket_reso": 256}
        compiled = {"compile": True, "compile_backend": "aot_eager", "gradient_checkpointing": recomputed}
        rows = [replace(BENCHMARK.TOY, options=options) for options in (sizes, {**sizes, **compiled})]
        first, second = (BENCHMARK.run_row(row, CPU, steps=1) for row in rows)
        assert first["tflop_per_step"] == second["tflop_per_step"] > 0

    @pytest.mark.full
    def test_the_command_measures_in_processes_of_their_own(self, tmp_path: Path, capsys: Any) -> None:
        path = tmp_path / "rows.jsonl"
        assert BENCHMARK.main(["--only", "toy", "--steps", "1", "--rehearse", "--json", str(path)]) == 0
        (result,) = (json.loads(line) for line in path.read_text().splitlines())
        assert result["outcome"] == "measured"
        assert result["rehearsed_gib"] > 0
        assert "| toy |" in capsys.readouterr().out

    def test_a_row_that_does_not_fit_says_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total")

        monkeypatch.setattr(BENCHMARK, "measure_steps", fail)
        result = BENCHMARK.run_row(BENCHMARK.TOY, CPU, steps=1)
        assert result["outcome"] == "does not fit: CUDA out of memory"
        assert "does not fit" in list(BENCHMARK.format_results([result]))[-1]

    def test_a_row_that_fails_gives_its_last_line(self) -> None:
        result = BENCHMARK.read_result("toy", 1, "", "Traceback\nValueError: no\n")
        assert result == {"row": "toy", "outcome": "failed: ValueError: no"}
        assert "ValueError: no" in list(BENCHMARK.format_results([result]))[-1]

    def test_without_a_gpu_published_sizes_are_passed_over(self, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert BENCHMARK.main(["--only", "flux-*"]) == 0
        assert "there is no CUDA device" in capsys.readouterr().out

    def test_the_share_of_the_arithmetic_is_that_of_the_named_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
        found = BENCHMARK.describe_steps([0.5, 0.54, 9.0], 2, 267e12, torch.device("cuda"))
        assert found["seconds_per_step"] == 0.54
        assert found["images_per_second"] == pytest.approx(2 / 0.54)
        assert found["mfu"] == pytest.approx(0.5, abs=0.001)

    def test_arithmetic_of_an_adapter_has_no_gradients_of_weights(self) -> None:
        counts = {"aten.addmm": 1, "aten._scaled_dot_product_flash_attention": 10, "aten.bmm": 100, "aten.mm": 1000}
        assert BENCHMARK.add_backward(counts) == 2 + 30 + 300 + 2000

    def test_every_row_can_be_configured(self, tmp_path: Path) -> None:
        """What the options say is what the run has; a misspelled one would be an error."""
        rows = BENCHMARK.list_rows()
        assert len(rows) == 6 * 4 + 1
        config = BENCHMARK.make_config(rows["sd15-compiled-checkpointed"], tmp_path)
        assert config.memory.compile
        assert config.memory.gradient_checkpointing
        assert config.buckets.resolution == (512, 512)
