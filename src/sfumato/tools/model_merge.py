"""Weighted sums of checkpoints, tensor by tensor, in the layout of the first one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sfumato.common.text import plural
from sfumato.errors import UserError
from sfumato.families.checkpoint_saving import SOURCE_METADATA, TensorEntry
from sfumato.families.part import DENOISER_PREFIX
from sfumato.formats.checkpoint import SAFETENSORS_DTYPES, TOOL_DTYPES, Checkpoint, open_checkpoint
from sfumato.formats.header import TensorInfo
from sfumato.tools.adapter_files.outputs import check_output, make_spec_entries, name_output, write_checkpoint

OLD_ENCODER, ENCODER = "cond_stage_model.transformer.", "cond_stage_model.transformer.text_model."


@dataclass(frozen=True, kw_only=True)
class SumRequest:
    """Which checkpoints to add up."""

    models: Sequence[Path]
    output: Path
    ratios: Sequence[float] = ()  # one for each; empty: equal ones that sum to 1
    denoiser_only: bool = False
    precision: str | None = None  # of TOOL_DTYPES; None: those of the first
    show_skipped: bool = False


def merge_models(request: SumRequest) -> list[str]:
    """Write the weighted sum; the lines of the report.

    Where a model lacks a key, the first one's tensor counts for it, too. UserError for tensors of other shapes.
    """
    check_output(request.output, request.models)
    count = len(request.models)
    if request.ratios and len(request.ratios) != count:
        raise UserError(
            f"--ratios has {plural(len(request.ratios), 'number')} for {plural(count, 'model')}",
            code="model-ratio-count",
            fix="give one for each",
        )
    ratios = request.ratios or [1 / count] * count
    with ExitStack() as stack:
        files = [stack.enter_context(open_checkpoint(path)) for path in request.models]
        names = [{normalize_key(key): key for key in file.header.tensors} for file in files]
        check_common_keys(request.models, names)
        entries: dict[str, TensorEntry] = {}
        lines = [f"{path} x {ratio:g}" for path, ratio in zip(request.models, ratios, strict=True)]
        for plain, key in names[0].items():
            if request.denoiser_only and not key.startswith(DENOISER_PREFIX):
                continue
            info = files[0].header.tensors[key]
            found = [(file, own.get(plain)) for file, own in zip(files, names, strict=True)]
            check_same_shapes(found, info, key)
            make = partial(sum_tensors, found, ratios, key)
            origins = tuple((file, own) for file, own in found if own is not None)
            entries[key] = TensorEntry((SAFETENSORS_DTYPES[info.dtype], info.shape), make, origins=origins)
        lines += describe_skipped(request, names)
        metadata = {name: text for name, text in files[0].header.metadata.items() if name in SOURCE_METADATA}
        merged = ", ".join(path.stem for path in request.models)
        metadata |= {"format": "pt", **make_spec_entries(request.output, ()), "modelspec.merged_from": merged}
        named = name_output(request.output)
        lines += write_checkpoint(request.output, iter(entries.items()), metadata, TOOL_DTYPES[request.precision])
    return [*lines, f"{named}: {plural(len(entries), 'tensor')}"]


def normalize_key(key: str) -> str:
    """The key as newer files have it: some of Stable Diffusion 1 lack a level of the text encoder's."""
    if key.startswith(OLD_ENCODER) and not key.startswith(ENCODER):
        return ENCODER + key.removeprefix(OLD_ENCODER)
    return key


def check_common_keys(models: Sequence[Path], names: Sequence[dict[str, str]]) -> None:
    """UserError for a model that shares hardly any key with the first, so that it would count for nothing."""
    for path, own in zip(models[1:], names[1:], strict=True):
        common = len(own.keys() & names[0].keys())
        if 2 * common < min(len(own), len(names[0])):
            raise UserError(
                f"{path} shares {common} of its {plural(len(own), 'tensor')} with {models[0]}, which has "
                f"{len(names[0])}",
                code="models-of-several-kinds",
                fix="give models of one family, in one layout (sfumato model convert)",
            )


def check_same_shapes(found: Sequence[tuple[Checkpoint, str | None]], info: TensorInfo, key: str) -> None:
    for file, own in found:
        if own is not None and file.header.tensors[own].shape != info.shape:
            raise UserError(
                f"{file.header.path}: {own} has the shape {file.header.tensors[own].shape}, in the first model it is "
                f"{info.shape}",
                code="model-shapes-differ",
                fix="give models of one family and size",
            )


@torch.no_grad()
def sum_tensors(found: Sequence[tuple[Checkpoint, str | None]], ratios: Sequence[float], key: str) -> Tensor:
    """The weighted sum in float32; integers, and numbers such as positions, are the first model's."""
    first = found[0][0]
    if not SAFETENSORS_DTYPES[first.header.tensors[key].dtype].is_floating_point:
        return first.read(key)
    share = sum(ratio for (_, own), ratio in zip(found, ratios, strict=True) if own is None)
    total = first.read(key, dtype=torch.float32).mul_(ratios[0] + share)
    for (file, own), ratio in zip(found[1:], ratios[1:], strict=True):
        if own is not None:
            total.add_(file.read(own, dtype=torch.float32), alpha=ratio)
    return total


def describe_skipped(request: SumRequest, names: Sequence[dict[str, str]]) -> list[str]:
    """Lines about keys that only some models have."""
    lines: list[str] = []
    for path, own in zip(request.models[1:], names[1:], strict=True):
        missing, further = [k for k in names[0] if k not in own], [own[k] for k in own if k not in names[0]]
        if missing:
            lines.append(f"{path} lacks {plural(len(missing), 'tensor')}, for which the first model's count")
        if further:
            lines.append(
                f"{path} has {plural(len(further), 'tensor')} that the first model lacks; they are not written"
            )
        if request.show_skipped:
            lines += [f"  {key}" for key in (*missing, *further)]
    return lines
