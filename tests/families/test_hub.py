"""Base models by their name on the hub, from its cache on this machine; no test reaches the network."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest
from huggingface_hub.utils import filter_repo_objects

from families.loading import load_family
from sfumato.config import ModelOptions, NoiseOptions
from sfumato.demo.toy import write_toy
from sfumato.errors import UserError
from sfumato.families import register_families
from sfumato.families.base import find_family
from sfumato.families.hub_models import find_network_path, find_tokenizer_path
from sfumato.families.source import find_path, find_weight_file, open_source

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def cached(cache: Path, name: str) -> Path:
    """A snapshot's folder as the hub's library lays it out."""
    place = cache / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(COMMIT)
    return place / "snapshots" / COMMIT


def test_a_model_in_the_cache_is_loaded_by_its_name(cache: Path) -> None:
    write_toy("sd", cached(cache, "someone/toy-sd"), layout="diffusers")
    register_families()
    model = ModelOptions(pretrained_model_name_or_path="someone/toy-sd")
    source = open_source(model)
    assert source.name == "someone/toy-sd"
    assert source.path == cache / "models--someone--toy-sd" / "snapshots" / COMMIT
    family = find_family(None, source)
    blueprint = family.read(source, model, NoiseOptions())
    loaded = load_family(family, blueprint, model)
    assert loaded.name == "sd"


def stand_in_for_downloads(names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that empty files of a repository with these come to, filtered as the hub's library does."""
    folder = tmp_path / "snapshot"

    def download(name: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        for path in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).touch()
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return folder


@pytest.mark.parametrize("only", ["x.safetensors", "x.bin", "x.fp16.safetensors", "x.fp16.bin"])
def test_what_is_downloaded(only: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pickled files and variants only where there is nothing else. A stand-in filters as the hub's library does."""
    names = [
        f"unet/{only.replace('x', 'diffusion_pytorch_model')}",
        "unet/config.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "safety_checker/model.safetensors",
    ]
    folder = stand_in_for_downloads(names, tmp_path, monkeypatch)
    assert find_path("someone/toy") == folder
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*")) == sorted(names[:4])


@pytest.mark.parametrize(("name", "more", "weights"), [
    ("a ControlNet", ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors", "images/1.png"),
     "diffusion_pytorch_model.safetensors"),
    ("an autoencoder", ("sdxl_vae.safetensors", "diffusion_pytorch_model.bin"), "diffusion_pytorch_model.safetensors"),
    ("an encoder", ("flax_model.msgpack", "tf_model.h5"), "model.safetensors"),
    ("an encoder, pickled", ("tf_model.h5", "merges.txt"), "pytorch_model.bin"),
    ("a file of its own name", ("README.md",), "flux-canny-controlnet-v3.safetensors"),
])  # fmt: skip
def test_a_network_alone_is_downloaded(
    name: str, more: tuple[str, ...], weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are at the top of the repository: one file of weights, and configurations."""
    stand_in_for_downloads(["config.json", weights, *more], tmp_path, monkeypatch)
    folder = find_network_path("someone/network")
    assert {path.name for path in folder.iterdir()} == {"config.json", weights}, name
    assert find_weight_file(folder).name == weights


def test_a_tokenizer_comes_without_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["tokenizer_config.json", "vocab.json", "merges.txt", "spiece.model"]
    stand_in_for_downloads([*names, "model.safetensors", "onnx/model.onnx", "onnx/config.json"], tmp_path, monkeypatch)
    assert sorted(path.name for path in find_tokenizer_path("someone/encoder").iterdir()) == sorted(names)


def test_what_is_not_in_the_cache_says_so(cache: Path) -> None:
    with pytest.raises(UserError, match="someone/else") as error:
        find_path("someone/else")
    assert error.value.code == "hub-model-unavailable"


@pytest.mark.parametrize("name", ["missing.safetensors", "a/b/c", "/nowhere/at all"])
def test_a_missing_path_is_not_looked_for_on_the_hub(cache: Path, name: str) -> None:
    with pytest.raises(UserError) as error:
        find_path(name)
    assert error.value.code == "model-path-missing"


def test_files_and_folders_take_precedence(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone" / "toy").mkdir(parents=True)
    assert find_path("someone/toy") == Path("someone/toy")
    assert open_source(ModelOptions(pretrained_model_name_or_path="someone/toy")).name == "toy"
