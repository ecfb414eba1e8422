"""`sfumato plan --fit`: the measures that a run can take, what is found for a card, and the file of --apply."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from families.toys import ToyShelf
from rehearsing import needs_rehearsal
from sfumato.cli.main import main
from sfumato.common.text import GIB
from sfumato.config import Config, load_config
from sfumato.errors import Problems, UserError
from sfumato.memory.measures import MEASURES
from sfumato.memory.rehearsal.backend import register_backend
from sfumato.methods.model_plan import plan_model
from sfumato.plan import make_run_plan
from sfumato.tools.fit import find_levels
from sfumato.tools.fit_search import Levels
from sfumato.tools.fit_trials import Choice, Trial, TrialSeries, bound_run, list_choices
from sfumato.tools.memory_bound import bound_memory
from sfumato.tools.rehearsal_stages import Stage
from sfumato.tools.rehearse import ALLOWANCE
from toy_runs import make_arguments, make_images

OFFERED = (
    "text encoders' blocks in main memory 1", "blocks in main memory 4", "inputs of blocks in main memory 1",
    "weights in fewer bits 2",
)  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data"))


def load_toy(toy_shelf: ToyShelf, images: Path, family: str = "flux", **options: Any) -> Config:
    return load_config(make_arguments(toy_shelf.paths(family), images, images.parent / "out", **options))


def list_names(config: Config) -> Iterator[str]:
    """Of the measures that the run can take, with their levels; of the others what their lines begin with."""
    for choice in list_choices(make_run_plan(config, processes=1), config):
        yield f"{choice.name} {len(choice.levels)}" if isinstance(choice, Choice) else choice.partition(",")[0]


class TestMeasures:
    def test_what_a_plain_run_can_take(self, toy_shelf, images):
        config = load_toy(toy_shelf, images, train_batch_size=4, network_train_unet_only=True)
        assert list(list_names(config)) == [
            "cached latents 1",
            "cached text 1",
            "text encoders' blocks in main memory 1",
            "bfloat16 1",
            "smaller batches 2",
            "blocks in main memory 4",
            "gradient checkpointing 1",
            *OFFERED[2:],
        ]

    def test_what_is_given_is_not_offered(self, toy_shelf, images):
        options = {"cache_latents": True, "mixed_precision": "fp16", "gradient_checkpointing": True}
        config = load_toy(toy_shelf, images, **options, network_train_unet_only=True)
        assert list(list_names(config)) == ["cached text 1", *OFFERED]

    def test_what_the_run_refuses(self, toy_shelf, images):
        """Images that change at every step, and text encoders that all train."""
        config = load_toy(toy_shelf, images, "sd", color_aug=True, mixed_precision="bf16", gradient_checkpointing=True)
        assert list(list_names(config)) == ["cached latents: not possible", "cached text: not possible", *OFFERED]

    def test_what_would_train_something_else(self, toy_shelf, images):
        """This model's text encoder does not train where its features are cached."""
        config = load_toy(toy_shelf, images, "lumina", mixed_precision="bf16", gradient_checkpointing=True)
        assert list(list_names(config)) == ["cached latents 1", "cached text: not possible", *OFFERED]

    @pytest.mark.parametrize("batch_size", [1, 2])
    def test_a_batch_size_in_the_dataset_file(self, toy_shelf, images, tmp_path, batch_size):
        """It takes precedence, so that accumulation alone would change; also where it is the smallest already."""
        path = tmp_path / "data.toml"
        folder = (images / "2_cat").as_posix()
        path.write_text(f'[[datasets]]\nbatch_size = {batch_size}\n[[datasets.subsets]]\nimage_dir = "{folder}"\n')
        options = {"train_data_dir": None, "dataset_config": path, "train_batch_size": 2, "cache_latents": True}
        config = load_toy(toy_shelf, images, **options, mixed_precision="bf16", gradient_checkpointing=True)
        assert "smaller batches: not possible" in list(list_names(config))

    def test_a_step_has_as_many_images_as_before(self, toy_shelf, images):
        config = load_toy(toy_shelf, images, train_batch_size=6, gradient_accumulation_steps=2)
        levels = MEASURES.get("smaller batches").list_levels(config)
        pairs = [(values["train_batch_size"], values["gradient_accumulation_steps"]) for values in levels]
        assert pairs == [(3, 4), (2, 6), (1, 12)]

    def test_full_training_and_ema(self, toy_shelf, images):
        options = {"method": "full", "network_dim": None, "ema_decay": 0.99, "cache_latents": True}
        options |= {"vae_batch_size": 2, "sample_batch_size": 2, "gradient_checkpointing": True}
        names = list(list_names(load_toy(toy_shelf, images, **options, mixed_precision="bf16")))
        assert names == [
            "cached text 1",
            "images encoded one at a time 1",
            OFFERED[0],
            "previews one at a time 1",
            "trained weights in bfloat16 1",
            "EMA on the CPU 1",
            "fused backward pass 1",
            *OFFERED[1:3],
        ]


@needs_rehearsal
@pytest.mark.full
def test_the_optimum_of_a_known_case(toy_shelf, images):
    """Every set with caches is rehearsed; on a card of each of their sizes the fastest of those that fit is found."""
    options = {"train_batch_size": 4, "mixed_precision": "bf16", "network_train_unet_only": True, "resolution": 128}
    config = load_toy(toy_shelf, images, **options, max_bucket_reso=256)
    choices = [each for each in list_choices(make_run_plan(config, processes=1), config) if isinstance(each, Choice)]
    choices = [
        choice for choice in choices if not choice.name.endswith(("main memory", "fewer bits"))
    ]  # else there are too many sets
    assert [choice.name for choice in choices[2:]] == ["smaller batches", "gradient checkpointing"]
    nothing = (0, 0, 0, 0)
    sets = [(1, 1, batches, checkpointing) for checkpointing in (0, 1) for batches in (0, 1, 2)]  # in the order of time
    series = TrialSeries(config=config, available=10 * GIB, choices=choices)
    peaks = {levels: series.rehearse(levels).peak for levels in (nothing, *sets)}
    assert peaks[nothing] > peaks[sets[0]] > peaks[sets[1]] > peaks[sets[2]]
    assert peaks[sets[0]] > peaks[sets[3]]
    found: set[Levels] = set()
    for card in peaks.values():
        series = TrialSeries(config=config, available=card, choices=choices)
        series.trials |= {levels: Trial(peak=peak, stage="") for levels, peak in peaks.items()}
        expected = nothing if card >= peaks[nothing] else next(levels for levels in sets if peaks[levels] <= card)
        assert find_levels(series) == expected
        found.add(expected)
    assert len(found) >= 4


@pytest.mark.full
@needs_rehearsal
def test_the_command(toy_shelf, images, tmp_path, capsys):
    """What fits is left as it is, and the file trains the same run."""
    argv = make_arguments(toy_shelf.paths("flux"), images, tmp_path / "out", network_train_unet_only=True)
    new, path = tmp_path / "new.toml", tmp_path / "fit.json"
    assert main(["plan", *argv, "--fit", "8GB", "--apply", str(new), "--json", str(path)]) == 0
    assert "fits: as it is" in capsys.readouterr().out
    assert json.loads(path.read_text())["options"] == {}
    given, written = load_config(argv), load_config(["--config_file", str(new)])
    for name in given.sources:
        assert name == "config_file" or written.value(name) == given.value(name), name
    assert not (tmp_path / "out").exists()


@needs_rehearsal
def test_the_file_has_what_was_found(toy_shelf, images, tmp_path, monkeypatch):
    monkeypatch.setattr("sfumato.tools.fit.find_levels", lambda series: (1, 0, 0, 1, 0, 0, 0, 0))
    monkeypatch.setattr("sfumato.tools.fit.describe_found", lambda series, found, deadline: ())
    argv = make_arguments(toy_shelf.paths("flux"), images, tmp_path / "out", network_train_unet_only=True)
    new = tmp_path / "new.toml"
    assert main(["plan", *argv, "--fit", "8GB", "--apply", str(new)]) == 0
    written = load_config(["--config_file", str(new)])
    assert written.cache.cache_latents_to_disk
    assert written.memory.mixed_precision == "bf16"
    assert not written.memory.gradient_checkpointing
    assert written.network.network_dim == 2


@pytest.mark.full
@needs_rehearsal
def test_nothing_fits(toy_shelf, images, tmp_path, codes, capsys):
    argv = make_arguments(toy_shelf.paths("flux"), images, tmp_path / "out", network_train_unet_only=True)
    new = tmp_path / "new.toml"
    assert main(["plan", *argv, "--fit", "0.5GB", "--apply", str(new)]) == 2
    assert codes == ["nothing-fits-card"]
    needed, missing = re.findall(r"(\d+\.\d\d) GB", capsys.readouterr().err)
    assert float(missing) == pytest.approx((ALLOWANCE - 0.5 * GIB) / 1e9 + float(needed), abs=0.01)
    assert not new.exists()


def test_the_least_is_told_from_bounds(toy_shelf, images):
    """A bound of the run as it is may be below what the least set of measures needs."""
    config = load_toy(toy_shelf, images, network_train_unet_only=True)
    choice = Choice(name="some measure", measure=MEASURES.get("bfloat16"), levels=[{"mixed_precision": "bf16"}])
    series = TrialSeries(config=config, available=2 * 10**9, choices=[choice])
    stage = Stage(name="preview", peak=10**10, resident={}, largest=(), waits=())
    series.trials |= {
        (0,): Trial(peak=3 * 10**9, stage="training step"),
        (1,): Trial(peak=10**10, stage="preview", stages=[stage]),
    }
    with pytest.raises(UserError) as error:
        find_levels(series)
    assert "some measure" in error.value.what
    assert "10.00 GB (preview), 8.00 GB too much" in error.value.what


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["--apply", "x.toml"], "apply-without-fit"),
        (["--fit", "12GB", "--rehearse"], "fit-with-rehearse"),
        (["--fit", "12GB", "--device", "12GB"], "fit-with-rehearse"),
        (["--fit", "12GB", "--apply", "x.json"], "config-written-as-toml"),
        (["--fit", "0GB"], "option-value-malformed"),
    ],
)
def test_faults(codes, argv, code):
    assert main(["plan", *argv, "--published", "sd15"]) == 2
    assert code in codes


@pytest.mark.full
def test_a_published_run_leaves_no_paths_behind(tmp_path, monkeypatch):
    """The model and the images of the command end with it."""
    monkeypatch.setattr("sfumato.tools.fit.find_levels", lambda series: (0,) * len(series.choices))
    monkeypatch.setattr("sfumato.tools.fit.describe_found", lambda series, found, deadline: ())
    new = tmp_path / "new.toml"
    argv = ["plan", "--fit", "12GB", "--published", "sd15", "--network_dim", "8", "--apply", str(new)]
    assert main([*argv, "--output_dir", str(tmp_path / "mine")]) == 0
    text = new.read_text()
    assert "network_dim = 8" in text
    assert f'output_dir = "{(tmp_path / "mine").as_posix()}"' in text
    assert "sfumato-" not in text
    assert "pretrained_model_name_or_path" not in text


@pytest.mark.full
def test_it_needs_what_a_rehearsal_needs(codes, monkeypatch):
    monkeypatch.setattr("sfumato.memory.rehearsal.backend.is_supported", lambda: False)
    assert main(["plan", "--fit", "12GB", "--published", "sd15", "--network_dim", "8"]) == 2
    assert codes == ["rehearsal-torch-too-old"]


class TestBound:
    def test_by_hand(self, toy_shelf, images):
        """Full training: float32 weights, gradients, two moments; the encoders in bfloat16; the autoencoder is gone."""
        options = {"method": "full", "network_dim": None, "cache_latents": True, "mixed_precision": "bf16"}
        config = load_toy(toy_shelf, images, "sd", **options)
        plan = plan_model(config, Problems())
        counts = {
            name: sum(shape.numel() for shape in network.weights.read_shapes().values())
            for name, network in plan.blueprint.networks.items()
        }
        text = sum(counts[part] for part in plan.blueprint.text_parts)
        assert bound_memory(plan, torch.device("cpu")) == ("training step", 16 * counts["denoiser"] + 2 * text)

    def test_adapters_and_emas(self, toy_shelf, images):
        further = [{}, {"ema_decay": 0.9}, {"ema_decay": 0.9, "ema_on_cpu": True}, {"optimizer_type": "SGD"}]
        configs = [load_toy(toy_shelf, images, **{"network_train_unet_only": True, **more}) for more in further]
        plan = plan_model(configs[0], Problems())
        trained = sum(part.parameters for part in plan.parts)
        plain, ema, on_cpu, sgd = (bound_memory(plan_model(each, Problems()), torch.device("cpu")) for each in configs)
        assert ema.size - plain.size == 4 * trained
        assert on_cpu == plain
        assert plain.size - sgd.size == 8 * trained

    def test_an_encoder_may_be_largest(self, toy_shelf, images):
        """Its caching counts where it needs more than the step."""
        caches = {"cache_latents": True, "cache_text_encoder_outputs": True, "network_train_unet_only": True}
        plan = plan_model(load_toy(toy_shelf, images, **caches), Problems())
        bound = bound_memory(plan, torch.device("cpu"))
        tensors = plan.blueprint.networks["t5"].weights
        t5 = 4 * sum(s.numel() for name, s in tensors.read_shapes().items() if name not in tensors.tied)
        assert (bound.stage == "caching of t5") == (t5 == bound.size)

    @needs_rehearsal
    @pytest.mark.full
    @pytest.mark.parametrize(
        ("family", "method"),
        [
            ("sd", "adapter"), ("sdxl", "full"), ("sd3", "adapter"),
            ("flux", "full"), ("chroma", "adapter"), ("lumina", "full"),
        ],
    )  # fmt: skip
    def test_no_rehearsal_needs_less(self, toy_shelf, images, family, method):
        options = {"method": method, "cache_latents": True, "mixed_precision": "bf16", "gradient_checkpointing": True}
        options |= {"network_dim": None} if method == "full" else {"network_train_unet_only": True}
        config = load_toy(toy_shelf, images, family, **options)
        register_backend()
        series = TrialSeries(config=config, available=GIB, choices=[])
        needed = series.rehearse(()).peak
        assert 0 < max(bound.size for bound in bound_run(config)) <= needed
