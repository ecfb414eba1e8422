"""`sfumato lora merge`: adapters into a checkpoint, or several into one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BeforeValidator

from sfumato.cli.options_command import run_with_options, show_report
from sfumato.config.base import Metavar, Options, option
from sfumato.config.values import FilePath, FilePaths, Floats, ModelPath, to_tuple
from sfumato.errors import UserError

ToolPrecision = Literal["float", "fp16", "bf16", "fp8", "fp8_e4m3fn", "fp8_e5m2", "fp8_e4m3fnuz", "fp8_e5m2fnuz"]
ENCODERS = ("clip_l", "clip_g", "t5xxl", "gemma2")  # options
Lists = Annotated[tuple[str, ...], BeforeValidator(to_tuple), Metavar("LIST ...")]


class LoraMergeOptions(Options):
    """Merges adapters of any kind and program into a checkpoint (--model), of which one tensor is in memory at a time,
    or adds several up into one LoRA. That is exact, with the sum of all ranks, unless --new_rank asks for less. One
    file with --new_rank turns any other kind into a LoRA, and says how much of its change is lost.
    """

    files: FilePaths = option(
        (), "the adapters: files, or folders of PEFT or diffusers", positional=True, required=True
    )
    model: ModelPath | None = option(None, "merge into this checkpoint: a file, a folder, or a name on the hub")
    base_model: ModelPath | None = option(
        None, "without --model: whose weights are read, for kinds whose change depends on them, e.g. DoRA and OFT"
    )
    save_to: FilePath | None = option(None, "the file or folder to write")
    ratios: Floats = option((), "strength of each adapter, 1 by default")
    lbws: Lists = option(
        (), "for each adapter a JSON list of strengths of a UNet's blocks, of 12, 17, 20 or 26 numbers"
    )
    without: Annotated[str, Metavar("PART,PART")] = option("", "parts of the model to leave as they are, e.g. t5")
    clip_l: ModelPath | None = option(None, "CLIP-L, where the adapters change it and the checkpoint does not hold it")
    clip_g: ModelPath | None = option(None, "the same of CLIP-G")
    t5xxl: ModelPath | None = option(None, "the same of T5-XXL")
    gemma2: ModelPath | None = option(None, "the same of Gemma 2")
    clip_l_save_to: FilePath | None = option(None, "the file to write for --clip_l")
    clip_g_save_to: FilePath | None = option(None, "the file to write for --clip_g")
    t5xxl_save_to: FilePath | None = option(None, "the file to write for --t5xxl")
    gemma2_save_to: FilePath | None = option(None, "the file to write for --gemma2")
    new_rank: int | None = option(None, "without --model: the nearest LoRA of this rank, by SVD", ge=1)
    new_conv_rank: int | None = option(None, "the same for convolutions; --new_rank by default", ge=1)
    shuffle: bool = option(False, "without --model: write the ranks in a random order, which changes nothing else")
    save_precision: ToolPrecision | None = option(None, "precision of what is written; as it is by default")
    family: str | None = option(None, "the model family, where files and names do not say it")
    device: str = option("cpu", "without --model: the device that computes")
    no_metadata: bool = option(False, "write only what programs need to use the file")


def main(argv: Sequence[str]) -> int:
    """Run `sfumato lora merge`."""
    return run_with_options("sfumato lora merge", argv, LoraMergeOptions, run_merge)


def run_merge(options: LoraMergeOptions) -> int:
    """Merge as the options say and show the report; gives the exit code."""
    return show_report(_join(options) if options.model is None else _merge_into(options.model, options))


def _merge_into(model: str, options: LoraMergeOptions) -> list[str]:
    from sfumato.tools.adapter_files.merge import MergeRequest, merge_into_model

    for name in ("new_rank", "new_conv_rank", "shuffle", "base_model"):
        if getattr(options, name):
            raise UserError(
                f"--{name} is for adapters that are added up, not for a merge into --model",
                code="merge-rank-with-model",
                fix=f"remove --{name} or --model",
            )
    request = MergeRequest(
        model=model,
        output=options.save_to,
        adapters=options.files,
        ratios=options.ratios,
        encoders=_list_encoders(options),
        encoder_outputs={name: getattr(options, f"{name}_save_to") for name in ENCODERS},
        block_weights=options.lbws,
        skipped_parts=[part for part in options.without.split(",") if part],
        precision=options.save_precision,
        family=options.family,
        minimal_metadata=options.no_metadata,
    )
    return merge_into_model(request)


def _list_encoders(options: LoraMergeOptions) -> dict[str, str | None]:
    return {name: getattr(options, name) for name in ENCODERS}


def _join(options: LoraMergeOptions) -> list[str]:
    from sfumato.tools.adapter_files.join import JoinRequest, join_adapters

    if options.save_to is None:
        raise UserError("no file to write is given", code="join-output-missing", fix="--save_to FILE")
    return join_adapters(
        JoinRequest(
            adapters=options.files,
            output=options.save_to,
            ratios=options.ratios,
            block_weights=options.lbws,
            new_rank=options.new_rank,
            new_conv_rank=options.new_conv_rank,
            shuffle=options.shuffle,
            precision=options.save_precision,
            family=options.family,
            device=options.device,
            minimal_metadata=options.no_metadata,
            base_model=options.base_model,
            encoders=_list_encoders(options),
        )
    )
