"""What an adapter file does: rank, norm and singular values of each layer's change, and what is wrong with it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sfumato.adapters.kinds import get_class, read_adapter_file
from sfumato.adapters.low_rank import Svd, count_effective_rank, decompose_product, decompose_randomly
from sfumato.common.text import format_bytes, list_some, plural
from sfumato.errors import UserError
from sfumato.families.part import PartSpec
from sfumato.formats.adapter_file import AdapterFile
from sfumato.formats.adapter_keys import ALPHA, guess_writer
from sfumato.formats.adapter_kind import LayerMatch, describe_kinds
from sfumato.formats.keymap import compile_pattern
from sfumato.tools.adapter_files.changes import find_low_rank
from sfumato.tools.adapter_files.join import form_matrix
from sfumato.tools.adapter_files.models import KnownFiles, list_input_paths, match_files
from sfumato.track.progress_task import ProgressTask

KNOWN_VALUES = 64  # singular values that are computed of a whole matrix
SHOWN_METADATA = {"trained on": "ss_base_model_version", "module": "ss_network_module", "steps": "ss_steps"}
LARGE_NORM = 1e4  # of a change, above which nothing that was trained is


@dataclass(frozen=True, kw_only=True)
class LayerFacts:
    """One name of a file. What depends on the model's weights is None."""

    name: str
    part: str  # empty where no known model has the name
    block: str  # the path of its block; empty outside of blocks
    layer: str  # the path of the layer inside; of several e.g. attn.to_q+to_k+to_v
    kinds: str
    rank: int | None
    alpha: float | None
    norm: float | None  # Frobenius norm of the change
    values: tuple[float, ...] = ()  # its singular values, the largest first

    @property
    def effective_rank(self) -> float | None:
        return count_effective_rank(torch.tensor(self.values)) if self.norm and self.values else None


@dataclass(frozen=True, kw_only=True)
class FileFacts:
    """What there is to say of a file."""

    path: Path
    family: str  # empty where none has its names
    writer: str
    size: int  # bytes
    dtypes: Mapping[str, int]  # name of a dtype -> tensors
    layers: Sequence[LayerFacts]
    problems: Sequence[str]
    metadata: Mapping[str, str]

    @property
    def blocks(self) -> dict[tuple[str, str], list[LayerFacts]]:
        """(part, block) -> its layers, in the order of the blocks' numbers."""
        found: dict[tuple[str, str], list[LayerFacts]] = defaultdict(list)
        for layer in self.layers:
            found[layer.part, layer.block].append(layer)
        return dict(sorted(found.items(), key=lambda item: (item[0][0], split_numbers(item[0][1]))))


def split_numbers(text: str) -> list[tuple[int, int, str]]:
    """A key by which blocks.10 comes after blocks.9."""
    return [(0, int(word), "") if word.isdecimal() else (1, 0, word) for word in text.split(".")]


@torch.no_grad()
def inspect_adapter(path: Path, family: str | None = None) -> FileFacts:
    """Read a file and measure every layer's change; UserError where it is no adapter file."""
    file = read_adapter_file(path)
    problems: list[str] = []
    known = None
    try:
        known = match_files([file], family)
    except UserError as error:
        problems.append(str(error))
    layers: list[LayerFacts] = []
    with ProgressTask(path.name, "layers") as progress:
        for layer in iterate_layers(file, known):
            layers.append(layer)
            progress(len(layers), len(file.layers))
    dtypes = Counter(str(t.dtype).removeprefix("torch.") for each in file.layers.values() for t in each.values())
    return FileFacts(
        path=path,
        family=known.family.name if known else "",
        writer=guess_writer(file.keys),
        size=sum(each.stat().st_size for each in list_input_paths(path)),
        dtypes=dtypes,
        layers=layers,
        problems=[*problems, *find_problems(file, layers)],
        metadata=file.metadata,
    )


def iterate_layers(file: AdapterFile, known: KnownFiles | None) -> Iterator[LayerFacts]:
    """The layers in the file's order."""
    found = {match.name: match for match in known.matches[0]} if known else {}
    for name, tensors in file.layers.items():
        kinds, alpha = file.kinds[name], tensors.get(ALPHA)
        part, block, layer, rank, svd = "", "", "", None, None
        if known and name in found:
            match = found[name]
            part = match.view.part
            block = find_block_path(known.specs[part], match.view.paths[0])
            layer = join_paths([path[len(block) :].lstrip(".") for path in match.view.paths])
            rank, svd = measure_layer(match)
        yield LayerFacts(
            name=name,
            part=part,
            block=block,
            layer=layer,
            kinds=describe_kinds(kinds),
            rank=rank,
            alpha=None if alpha is None else float(alpha),
            norm=svd.norm if svd else None,
            values=tuple(svd.s.tolist()) if svd else (),
        )


def find_block_path(spec: PartSpec, path: str) -> str:
    """The path of the block that a layer is in; empty outside of all."""
    for block in spec.blocks:
        inside = compile_pattern(f"{block}.{{*}}").fullmatch(path)
        if inside:
            return path[: inside.start(inside.re.groups) - 1]
    return ""


def join_paths(paths: Sequence[str]) -> str:
    """Paths of neighbors as one: a.q+k+v."""
    head, dot, _ = paths[0].rpartition(".")
    return head + dot + "+".join(path.rpartition(".")[2] for path in paths)


def measure_layer(match: LayerMatch) -> tuple[int | None, Svd | None]:
    """Rank and singular values of a change; of a wrapped adapter those of the change that is wrapped.

    None for what only the model's weights tell.
    """
    inner = LayerMatch(match.name, match.view, match.kinds[-1:], match.tensors)
    kind = get_class(inner.kinds[-1])
    if kind.reads_weights:
        return None, None
    factors = find_low_rank(inner)
    if factors:
        return len(factors.down), decompose_product(factors)
    matrix = form_matrix(inner, with_biases=False)
    return None, decompose_randomly(matrix, min(KNOWN_VALUES, *matrix.shape))


def find_problems(file: AdapterFile, layers: Sequence[LayerFacts]) -> Iterator[str]:
    """What a user should know before using or sharing the file."""
    zero = [layer.name for layer in layers if layer.norm == 0]
    if zero:
        yield f"{len(zero)} of {plural(len(layers), 'change is', 'changes are')} 0: {list_some(zero)}"
    large = [layer.name for layer in layers if layer.norm is not None and layer.norm > LARGE_NORM]
    if large:
        yield f"{plural(len(large), 'change has', 'changes have')} a norm above {LARGE_NORM:g}: {list_some(large)}"
    ends = {key.rpartition(".")[0] for key in file.keys if key.endswith(".alpha")}
    without = [layer.name for layer in layers if ends and layer.rank and layer.name not in ends]
    if without and len(without) < len(layers):
        yield (
            f"{plural(len(without), 'layer has', 'layers have')} no alpha, others have one; theirs counts as the "
            f"rank: {list_some(without)}"
        )
    yield from file.describe_passed_over()


# ---------------------------------------------------------------- text


def render_text(facts: FileFacts) -> list[str]:
    """The lines of the report."""
    dtypes = ", ".join(f"{count} {name}" for name, count in facts.dtypes.items())
    lines = [
        str(facts.path),
        f"  model       {facts.family or 'unknown'}" + (f", names of {facts.writer}" if facts.writer else ""),
        f"  layers      {len(facts.layers)}: {describe_layers(facts.layers)}",
        f"  tensors     {dtypes}, {format_bytes(facts.size)}",
    ]
    for title, name in SHOWN_METADATA.items():
        lines += [f"  {title:<12}{facts.metadata[name]}"] if name in facts.metadata else []
    lines += ["", f"  {'block':<44}{'layers':>6}{'rank':>9}{'alpha':>9}{'norm':>10}{'eff. rank':>11}"]
    for (part, block), layers in facts.blocks.items():
        lines.append(format_block(f"{part}.{block}" if block else part or "unknown", layers))
    lines += (
        ["", *(f"problem: {problem}" for problem in facts.problems)] if facts.problems else ["", "no problems found"]
    )
    return lines


def describe_layers(layers: Sequence[LayerFacts]) -> str:
    counts = Counter((layer.kinds, layer.part or "unknown layers") for layer in layers)
    return ", ".join(f"{count} {kinds} of {part}" for (kinds, part), count in counts.items())


def format_block(title: str, layers: Sequence[LayerFacts]) -> str:
    ranks = describe_values([layer.rank for layer in layers])
    alphas = describe_values([layer.alpha for layer in layers])
    norm, effective = sum_norms(layers), average_effective_rank(layers)
    shown = f"{norm:.4g}" if norm is not None else "-"
    rank = f"{effective:.1f}" if effective is not None else "-"
    return f"  {title:<44}{len(layers):>6}{ranks:>9}{alphas:>9}{shown:>10}{rank:>11}"


def describe_values(values: Sequence[float | None]) -> str:
    """ "8", "4-8", or "-" where none is known."""
    known = sorted({value for value in values if value is not None})
    if not known:
        return "-"
    return f"{known[0]:g}" if len(known) == 1 else f"{known[0]:g}-{known[-1]:g}"


def sum_norms(layers: Sequence[LayerFacts]) -> float | None:
    """The norm of all changes together."""
    norms = [layer.norm for layer in layers if layer.norm is not None]
    return sum(norm**2 for norm in norms) ** 0.5 if norms else None


def average_effective_rank(layers: Sequence[LayerFacts]) -> float | None:
    known = [layer.effective_rank for layer in layers if layer.effective_rank is not None]
    return sum(known) / len(known) if known else None
