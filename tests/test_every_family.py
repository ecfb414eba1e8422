"""The contract that every family meets, at toy size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from every_family import each_case, find_toys
from families.toys import ToyShelf
from sfumato.data.batch import Sizes
from sfumato.families.base import Family
from sfumato.families.checkpoint_saving import find_ema_keys, save_single_file
from sfumato.families.encoding import encode_with_grad
from sfumato.families.foreign_keys import V_MARK, ZERO_SNR_MARK


def inputs_of(model: Family, captions: list[str], size: int = 64, dtype: torch.dtype = torch.float32) -> Any:
    generator = torch.Generator().manual_seed(0)
    batch = len(captions)
    x = torch.randn(batch, model.latents.channels, size // 8, size // 8, generator=generator).to(dtype)
    features = {part: encode_with_grad(model, part, captions) for part in model.text_parts}
    return x, model.condition(features, Sizes.from_size(batch, size, size), None)


def predict(model: Family, captions: list[str], t: float = 600.0) -> Tensor:
    x, conditioning = inputs_of(model, captions)
    with torch.no_grad():
        return model.predict(x, torch.full((len(captions),), t), conditioning)


@each_case
def test_a_caption_has_room_for_as_many_tokens_as_are_read(case: str, toy_shelf: ToyShelf) -> None:
    """What lies beyond changes nothing of any encoder's features, and the last token that has room does."""
    toys = find_toys(toy_shelf, case)
    model = toys.load(toys.original)
    for part in model.text_parts:
        room = model.token_budget(part, ["cat", "a red cat"])
        assert room is not None
        assert room.lengths[0] < room.lengths[1]
        words = room.limit // room.lengths[0]
        assert words * room.lengths[0] == room.limit
        shorter, full, longer = (encode_with_grad(model, part, [" ".join(["cat"] * (words + i))]) for i in (-1, 0, 1))
        assert all(torch.equal(full[name], longer[name]) for name in full)
        assert any(not torch.equal(full[name], shorter[name]) for name in full)


@each_case
def test_both_layouts_give_the_same_model(case: str, toy_shelf: ToyShelf) -> None:
    toys = find_toys(toy_shelf, case)
    original, diffusers = (predict(toys.load(options), ["a cat"]) for options in (toys.original, toys.diffusers))
    torch.testing.assert_close(original, diffusers, rtol=0, atol=1e-6)


@each_case
def test_a_loaded_single_file_is_saved_again_bit_for_bit(case: str, toy_shelf: ToyShelf, tmp_path: Path) -> None:
    toys = find_toys(toy_shelf, case)
    model = toys.load(toys.original)
    inside = {name: part.module for name, part in model.parts.items() if model.blueprint.in_file(name)}
    every = {name: module.state_dict().keys() for name, module in inside.items()}
    save_single_file(model, tmp_path / "again.safetensors", {}, changed=every)
    before, after = (
        load_file(str(toys.original.pretrained_model_name_or_path)),
        load_file(tmp_path / "again.safetensors"),
    )
    assert set(before) - set(after) == set(find_ema_keys(model.blueprint.source))  # of the weights before training
    assert set(after) - set(before) <= {V_MARK, ZERO_SNR_MARK}  # which say what the options said
    assert all(torch.equal(before[key], after[key]) for key in set(before) & set(after))


@each_case
def test_samples_do_not_see_their_neighbours(case: str, toy_shelf: ToyShelf) -> None:
    toys = find_toys(toy_shelf, case)
    model = toys.load(toys.original)
    together = predict(model, ["a cat", "a red cup of coffee on a wooden table"])
    alone = predict(model, ["a cat"])
    assert together.shape == (2, model.latents.channels, 8, 8)
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-5)


@each_case
def test_header_names_the_groups_that_the_loaded_model_has(case: str, toy_shelf: ToyShelf) -> None:
    toys = find_toys(toy_shelf, case)
    model = toys.load(toys.original)
    for name, part in model.parts.items():
        planned, real = model.blueprint.networks[name].groups(), part.groups()
        assert [group.name for group in planned] == [group.name for group in real]
        assert [group.rows for group in planned] == [group.rows for group in real]
