"""The fields of a batch, and stacking tensors of unequal shape."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch

from sfumato.data.batch import Batch, ImageInput, index_batch, pad_stack


@pytest.mark.parametrize(
    ("shapes", "result"),
    [([(3,), (3,)], (2, 3)), ([(2, 5), (4, 5), (1, 5)], (3, 4, 5)), ([(2, 3), (3, 2)], (2, 3, 3)), ([(), ()], (2,))],
)
def test_pad_stack(shapes, result):
    items = [torch.rand(shape, requires_grad=True) for shape in shapes]
    stacked = pad_stack(items)
    assert stacked.shape == result
    assert stacked.sum().item() == pytest.approx(sum(item.sum().item() for item in items), rel=1e-5)
    stacked.sum().backward()
    assert all(torch.equal(item.grad, torch.ones_like(item)) for item in items)


def test_masks_are_padded_with_false():
    stacked = pad_stack([torch.ones(2, dtype=torch.bool), torch.ones(3, dtype=torch.bool)])
    assert stacked.tolist() == [[True, True, False], [True, True, True]]


def test_the_contract_has_these_fields():
    assert {"ids", "latents", "pixels", "captions", "text", "text_dropped", "sizes", "extras", "weight", "mask",
            "preserve", "entry_seeds", "draws", "timestep_offset", "image_numbers",
            "concepts"} == {field.name for field in fields(Batch)}  # fmt: skip


def test_samples_are_taken_with_their_further_images():
    control = ImageInput(pixels=torch.arange(3.0).reshape(3, 1, 1, 1), strength=0.5)
    taken: Any = index_batch({"control": control}, torch.tensor([2, 0]))["control"]
    assert taken.pixels.flatten().tolist() == [2, 0]
    assert (taken.strength, taken.latents) == (0.5, None)
