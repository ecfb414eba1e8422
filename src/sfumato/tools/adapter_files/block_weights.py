"""Block weights: a strength for each block of a UNet, in lists of the lengths that web UIs know."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from sfumato.common.json_toml import decode_json
from sfumato.common.text import plural
from sfumato.errors import UserError
from sfumato.families.part import PartSpec
from sfumato.formats.adapter_kind import LayerMatch

BASE, MIDDLE = "BASE", "MID"


def _list_blocks(inputs: Sequence[int], outputs: Sequence[int]) -> tuple[str, ...]:
    return (BASE, *(f"IN{i:02}" for i in inputs), MIDDLE, *(f"OUT{i:02}" for i in outputs))


LISTS = {  # length of a list -> the block of each of its numbers; blocks that it lacks stay at 1
    12: _list_blocks((4, 5, 7, 8), range(6)),
    17: _list_blocks((1, 2, 4, 5, 7, 8), range(3, 12)),
    20: _list_blocks(range(9), range(9)),
    26: _list_blocks(range(12), range(12)),
}
BLOCK = re.compile(r"(input_blocks|output_blocks)\.(\d+)\.|middle_block\.")


def parse_block_weights(texts: Sequence[str], files: int) -> list[dict[str, float]]:
    """--lbws: a JSON list for each file -> the strength of each block. UserError for others."""
    if texts and len(texts) != files:
        raise UserError(
            f"--lbws has {plural(len(texts), 'list')} for {plural(files, 'file')}",
            code="block-weights-count",
            fix="give one for each file",
        )
    return [_parse_list(text) for text in texts] or [{}] * files


def _parse_list(text: str) -> dict[str, float]:
    try:
        numbers = decode_json(text)
    except ValueError:
        numbers = None
    numbers = numbers if isinstance(numbers, list) else []
    if len(numbers) not in LISTS or not all(type(each) in (int, float) for each in numbers):
        lengths = ", ".join(map(str, LISTS))
        raise UserError(
            f"--lbws {text}: not a list of {lengths} numbers",
            code="block-weights-invalid",
            fix='e.g. --lbws "[1,1,1,1,1,1,0.5,0.5,0.5,0.5,0.5,0.5]"',
        )
    return dict(zip(LISTS[len(numbers)], map(float, numbers), strict=True))


def find_block_weight(weights: Mapping[str, float], match: LayerMatch, spec: PartSpec) -> float:
    """The strength of a layer's block; 1 where the list does not have it. UserError for a model without such blocks."""
    if not weights:
        return 1.0
    block = find_block(match, spec)
    return weights.get(block, 1.0)


def find_block(match: LayerMatch, spec: PartSpec) -> str:
    """BASE for text encoders and for what lies outside of all blocks."""
    if spec.name != "denoiser":
        return BASE
    if not spec.lr_blocks:
        raise UserError(
            "--lbws is for models with a UNet; this one has other blocks",
            code="block-weights-without-unet",
            fix="remove --lbws",
        )
    found = BLOCK.match(spec.key_map.locate(match.view.paths[0]).original)
    if found is None:
        return BASE
    return MIDDLE if found[1] is None else f"{'IN' if found[1] == 'input_blocks' else 'OUT'}{int(found[2]):02}"
