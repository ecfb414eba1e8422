"""Words that count more and less, in every family: closed forms at the words' own places, and nothing elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from families.loading import load_model
from families.toys import ToyShelf
from sfumato.data.batch import Sizes
from sfumato.families import register_families
from sfumato.families.base import Family
from sfumato.families.encoding import FrozenTextEncoders, encode_captions, encode_text, encode_with_grad
from sfumato.sample import encode_prompts
from toy_runs import equal_tensors, make_images, read_metrics, read_weights, train_toy

register_families()
FAMILIES = ("sd", "sdxl", "flux", "chroma", "sd3", "lumina")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, toy_shelf: ToyShelf) -> Family:
    return load_model(toy_shelf.options(request.param), torch.float64)


def pair(model: Family, part: str, marked: str, plain: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Features of the text with its marks read, and of the text without them."""
    (ours,) = encode_captions(model, part, [marked], weighted=True)
    (base,) = encode_captions(model, part, [plain])
    return ours, base


def test_text_without_marks_is_encoded_as_ever(model: Family) -> None:
    for part in model.text_parts:
        ours, base = pair(model, part, "a red cup", "a red cup")
        assert all(torch.equal(ours[name], base[name]) for name in base)


def test_marks_are_words_without_prompt_weights(model: Family) -> None:
    for part in model.text_parts:
        (off,) = encode_captions(model, part, ["a (red:1.5) cup"])
        (literal,) = encode_captions(model, part, [r"a \(red:1.5\) cup"], weighted=True)
        assert all(torch.equal(off[name], literal[name]) for name in off)


# Each word is one token of the toys, after the begin token where there is one; T5's "a" and "red" are not words of its
# toy.
MARKED, PLAIN = "photo (cat:1.5) of [[cup]]", "photo cat of cup"
WEIGHTS = [1.0, 1.5, 1.0, 1 / 1.21]


@pytest.mark.parametrize(
    ("family", "part", "first"),
    [
        ("sd", "clip", 1),
        ("sdxl", "clip_l", 1),
        ("sdxl", "clip_g", 1),
        ("flux", "t5", 0),
        ("chroma", "t5", 0),
        ("sd3", "clip_l", 1),
        ("sd3", "t5", 0),
        ("lumina", "gemma2", 1),
    ],
)
def test_closed_form(family: str, part: str, first: int, toy_shelf: ToyShelf) -> None:
    """CLIP: m + w (h - m) with m the mean of all positions and channels; T5, Gemma 2: w h. Pooled vectors stay."""
    model = load_model(toy_shelf.options(family), torch.float64)
    ours, base = pair(model, part, MARKED, PLAIN)
    w = torch.ones(len(base["hidden"]), 1, dtype=torch.float64)
    w[first : first + 4, 0] = torch.tensor(WEIGHTS)
    mean = base["hidden"].mean() if part.startswith("clip") else 0.0
    torch.testing.assert_close(ours["hidden"], mean + w * (base["hidden"] - mean), atol=1e-12, rtol=0)
    assert not torch.allclose(ours["hidden"], base["hidden"])
    assert all(torch.equal(ours[name], base[name]) for name in base if name != "hidden")


def test_the_mean_of_a_text_of_one_weight_moves_little(toy_shelf: ToyShelf) -> None:
    """Around the mean: what lies at the mean stays, so no weight moves the whole."""
    model = load_model(toy_shelf.options("sd"), torch.float64)
    ours, base = pair(model, "clip", "(photo cat of cup:3)", PLAIN)
    assert abs(ours["hidden"].mean() - base["hidden"].mean()) < 3 * base["hidden"][1:5].std()


def test_words_in_later_chunks(toy_shelf: ToyShelf) -> None:
    """The 80th word of a long caption stands at place 80 behind the first begin token, chunks or not."""
    model = load_model(toy_shelf.options("sd", max_token_length=150), torch.float64)
    words = ["cat"] * 79
    ours, base = pair(model, "clip", " ".join([*words, "(cup:2)", "of"]), " ".join([*words, "cup", "of"]))
    changed = (ours["hidden"] != base["hidden"]).any(dim=1).nonzero().flatten().tolist()
    assert base["hidden"].shape[0] == 152
    assert changed == [80]


def test_weights_beyond_the_last_token_are_cut_with_their_words(model: Family) -> None:
    text = " ".join(["cat"] * 600)
    for part in model.text_parts:
        ours, base = pair(model, part, f"{text} (cup:2)", f"{text} cup")
        assert all(torch.equal(ours[name], base[name]) for name in base)


def test_live_is_cached_and_gradients_pass(model: Family) -> None:
    captions = [MARKED, "a red cup", "(two (big:2) words)"]
    for part in model.text_parts:
        encoder: Any = model.parts[part].module
        frozen = FrozenTextEncoders(model, weighted=True).encode(part, captions)
        encoder.requires_grad_(True)
        live = encode_with_grad(model, part, captions, weighted=True)
        for name, tensor in live.items():
            torch.testing.assert_close(tensor, frozen[name], atol=1e-10, rtol=0)
        total = torch.stack([tensor.double().sum() for tensor in live.values() if tensor.is_floating_point()]).sum()
        assert any(g is not None for g in torch.autograd.grad(total, list(encoder.parameters()), allow_unused=True))
        encoder.requires_grad_(False)


def test_samples_use_prompt_weights_by_default(model: Family) -> None:
    sizes = Sizes.from_size(1, 64, 64)
    on = encode_prompts(model, [MARKED], sizes, None, weighted=True)["encoder_hidden_states"]
    off = encode_prompts(model, [MARKED], sizes, None)["encoder_hidden_states"]
    plain = encode_prompts(model, [PLAIN], sizes, None)["encoder_hidden_states"]
    assert not torch.equal(on, off)
    assert not torch.equal(on, plain)


def test_a_family_without_prompt_weights_reads_marks_as_words(toy_shelf: ToyShelf, monkeypatch: Any) -> None:
    model = load_model(toy_shelf.options("sd"), torch.float64)
    monkeypatch.setattr(type(model), "options", frozenset())
    (found,) = encode_text(model, "clip", [MARKED], weighted=True)
    assert torch.equal(found["hidden"], model.encode_text("clip", [MARKED])[0]["hidden"])


@pytest.mark.full
@pytest.mark.parametrize("family", ["sd", "flux", "lumina"])
def test_training_on_weighted_captions(family: str, toy_shelf: ToyShelf, tmp_path: Path) -> None:
    """It changes what is learned, and the cache distinguishes captions with prompt weights from others."""
    toy, images = toy_shelf.paths(family), make_images(tmp_path / "images", 2)
    for path in images.glob("*/*.txt"):
        path.write_text("a photo of a (cat:1.5)")
    options = {"network_train_unet_only": True, "max_train_steps": 2}
    disk = {"cache_text_encoder_outputs_to_disk": True, "cache_dir": tmp_path / "cache"}
    plain = train_toy(toy, images, tmp_path / "plain", **options, **disk)
    cached = train_toy(toy, images, tmp_path / "cached", **options, **disk, weighted_captions=True)
    live = train_toy(toy, images, tmp_path / "live", **options, weighted_captions=True)
    assert not equal_tensors(read_weights(plain), read_weights(cached))
    assert equal_tensors(read_weights(live), read_weights(cached))
    assert read_metrics(live) == read_metrics(cached)
