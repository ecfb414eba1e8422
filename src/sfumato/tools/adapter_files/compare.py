"""Two adapters beside each other: where both change the same layers, in the same direction, from the same inputs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sfumato.adapters.kinds import get_class, read_adapter_file
from sfumato.adapters.low_rank import Factors, decompose_randomly
from sfumato.common.text import plural
from sfumato.formats.adapter_kind import LayerMatch
from sfumato.formats.adapter_layers import collect_groups
from sfumato.formats.groups import LayerGroup
from sfumato.tools.adapter_files.changes import find_low_rank
from sfumato.tools.adapter_files.inspect import KNOWN_VALUES, find_block_path, split_numbers
from sfumato.tools.adapter_files.join import form_matrix
from sfumato.tools.adapter_files.models import KnownFiles, match_files

STRONG = 0.3  # cosine or overlap that is far from that of unrelated changes


@dataclass(frozen=True, kw_only=True)
class ChangePair:
    """The changes of one layer group by both files."""

    part: str
    block: str
    product: float  # inner product of both changes
    norms: tuple[float, float]
    outputs: float  # overlap of what they write to, 0 to 1
    inputs: float  # the same of what they read


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What two files have in common."""

    paths: tuple[Path, Path]
    shared: Sequence[ChangePair]  # of layer groups that both change
    alone: tuple[int, int]  # layer groups that only one of them changes

    @property
    def blocks(self) -> Mapping[tuple[str, str], list[ChangePair]]:
        found: dict[tuple[str, str], list[ChangePair]] = defaultdict(list)
        for pair in self.shared:
            found[pair.part, pair.block].append(pair)
        return dict(sorted(found.items(), key=lambda item: (item[0][0], split_numbers(item[0][1]))))


@torch.no_grad()
def compare_adapters(first: Path, second: Path, family: str | None = None) -> Comparison:
    """UserError for files of different models, and for kinds whose change only the model's weights tell."""
    files = [read_adapter_file(path) for path in (first, second)]
    known = match_files(files, family)
    pairs: list[ChangePair] = []
    alone = [0, 0]
    for group in known.groups:
        changes = [find_change(found, group) for found in known.matches]
        if changes[0] and changes[1]:
            pairs.append(compare_changes(known, group, changes[0], changes[1]))
        else:
            alone[0 if changes[0] else 1] += 1
    return Comparison(paths=(first, second), shared=pairs, alone=(alone[0], alone[1]))


def find_change(found: Sequence[LayerMatch], group: LayerGroup) -> Factors | None:
    """The factors of a group's change, of a matrix its largest singular values; None where it has none."""
    for adapter in collect_groups(found, [group]):
        match = LayerMatch(group.name, group, adapter.kinds, adapter.make_tensors())
        factors = None if any(get_class(kind).reads_weights for kind in match.kinds) else find_low_rank(match)
        if factors:
            return factors
        matrix = form_matrix(match, with_biases=False)
        return decompose_randomly(matrix, min(KNOWN_VALUES, *matrix.shape)).truncate(KNOWN_VALUES)
    return None


def compare_changes(known: KnownFiles, group: LayerGroup, first: Factors, second: Factors) -> ChangePair:
    """<A, B> = sum of (up_A.T up_B) * (down_A down_B.T): no product is formed."""
    return ChangePair(
        part=group.part,
        block=find_block_path(known.specs[group.part], group.paths[0]),
        product=multiply_changes(first, second),
        norms=(max(multiply_changes(first, first), 0.0) ** 0.5, max(multiply_changes(second, second), 0.0) ** 0.5),
        outputs=measure_overlap(first.up, second.up),
        inputs=measure_overlap(first.down.t(), second.down.t()),
    )


def multiply_changes(first: Factors, second: Factors) -> float:
    return float(((first.up.t() @ second.up) * (first.down @ second.down.t())).double().sum())


def measure_overlap(first: Tensor, second: Tensor) -> float:
    """The mean squared cosine of the principal angles between two column spaces (Björck and Golub 1973)."""
    one, other = torch.linalg.qr(first).Q, torch.linalg.qr(second).Q
    return float((one.t() @ other).square().sum()) / min(one.shape[1], other.shape[1])


def render_comparison(comparison: Comparison) -> list[str]:
    """The lines of the report."""
    first, second = comparison.paths
    alone = f"{comparison.alone[0]} only in the first, {comparison.alone[1]} only in the second"
    lines = [
        f"{first} and {second}: {plural(len(comparison.shared), 'layer')} in both, {alone}",
        "",
        f"  {'block':<44}{'layers':>6}{'norms':>19}{'cosine':>9}{'outputs':>9}{'inputs':>9}",
    ]
    for (part, block), pairs in comparison.blocks.items():
        lines.append(format_pairs(f"{part}.{block}" if block else part, pairs))
    lines += [format_pairs("all", comparison.shared), ""] if comparison.shared else [""]
    return [*lines, *judge(comparison)]


def format_pairs(title: str, pairs: Sequence[ChangePair]) -> str:
    norms = [sum(pair.norms[i] ** 2 for pair in pairs) ** 0.5 for i in (0, 1)]
    outputs, inputs = (sum(values) / len(pairs) for values in zip(*((p.outputs, p.inputs) for p in pairs), strict=True))
    shown, cosine = f"{norms[0]:.3g} / {norms[1]:.3g}", round(find_cosine(pairs), 3) + 0.0  # never -0.000
    return f"  {title:<44}{len(pairs):>6}{shown:>19}{cosine:>9.3f}{outputs:>9.3f}{inputs:>9.3f}"


def find_cosine(pairs: Sequence[ChangePair]) -> float:
    """Of all changes together."""
    norms = [sum(pair.norms[i] ** 2 for pair in pairs) ** 0.5 for i in (0, 1)]
    return sum(pair.product for pair in pairs) / (norms[0] * norms[1]) if norms[0] * norms[1] else 0.0


def judge(comparison: Comparison) -> Iterator[str]:
    """Whether the two work for or against each other when they are used together."""
    if not comparison.shared:
        yield "they change no layer in common: used together, each does what it does alone"
        return
    cosine = find_cosine(comparison.shared)
    inputs = sum(pair.inputs for pair in comparison.shared) / len(comparison.shared)
    if cosine > STRONG:
        yield f"they push the same way (cosine {cosine:.2f}): used together, lower the strength of both"
    elif cosine < -STRONG:
        yield f"they work against each other (cosine {cosine:.2f}): used together, each undoes a part of the other"
    elif inputs > STRONG:
        yield f"they answer to the same inputs with other outputs (overlap {inputs:.2f}): used together, they mix"
    else:
        yield "they are nearly independent: used together, each does mostly what it does alone"
