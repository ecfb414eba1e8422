"""--clip_skip counts the layers of the text encoder from the end, and not beyond the first."""

from __future__ import annotations

import pytest

from families.toys import ToyShelf
from sfumato.config import NoiseOptions
from sfumato.demo.toy import Layout
from sfumato.errors import UserError
from sfumato.families.sd import StableDiffusion
from sfumato.families.source import open_source

TOYS: list[tuple[str, Layout, str]] = [
    ("sd", "original", ""),
    ("sd", "diffusers", ""),
    ("sd", "original", "2"),
    ("sd", "diffusers", "2"),
]


@pytest.mark.parametrize(("family", "layout", "variant"), TOYS)
def test_beyond_the_layers(toy_shelf: ToyShelf, family: str, layout: Layout, variant: str) -> None:
    def read(clip_skip: int | None) -> int:
        model = toy_shelf.options(family, layout, variant, clip_skip=clip_skip)
        blueprint = StableDiffusion.read(open_source(model), model, NoiseOptions())
        return blueprint.networks["clip"].config["num_hidden_layers"]

    layers = read(None)
    assert read(layers) == layers
    for number in (layers + 1, 99):
        with pytest.raises(UserError) as error:
            read(number)
        assert error.value.code == "clip-skip-beyond-layers"
        assert str(layers) in error.value.what
