"""`sfumato lora resize`: a LoRA at a smaller rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from sfumato.cli.lora_merge import ToolPrecision
from sfumato.cli.options_command import run_with_options, show_report
from sfumato.config.base import Options, option
from sfumato.config.values import FilePath

DynamicMethod = Literal["sv_ratio", "sv_fro", "sv_cumulative"]


class LoraResizeOptions(Options):
    """Writes a LoRA at a smaller rank: in each layer the nearest change of that rank, exactly. With --dynamic_method
    each layer gets the smallest rank that is enough, at most --new_rank.
    """

    source: FilePath = option(
        None, "the LoRA: a file, or a folder of PEFT or diffusers", positional=True, required=True
    )
    save_to: FilePath = option(None, "the file to write", required=True)
    new_rank: int = option(4, "the new rank; with --dynamic_method the largest", ge=1)
    new_conv_rank: int | None = option(None, "the same of convolutions; --new_rank by default", ge=1)
    dynamic_method: DynamicMethod | None = option(
        None, "keep singular values above the largest / N, or as many as give a share of norm or sum"
    )
    dynamic_param: float | None = option(None, "the number of --dynamic_method", gt=0)
    save_precision: ToolPrecision | None = option(None, "precision of what is written; that of the file by default")
    device: str = option("cpu", "the device that computes")
    verbose: bool = option(False, "show each layer")
    no_metadata: bool = option(False, "write only what programs need to use the file")


def main(argv: Sequence[str]) -> int:
    """Run `sfumato lora resize`."""
    return run_with_options("sfumato lora resize", argv, LoraResizeOptions, run_resize)


def run_resize(options: LoraResizeOptions) -> int:
    """Show the report; gives the exit code."""
    from sfumato.tools.adapter_files.resize import ResizeRequest, resize_adapter

    report = resize_adapter(
        ResizeRequest(
            source=options.source,
            output=options.save_to,
            new_rank=options.new_rank,
            new_conv_rank=options.new_conv_rank,
            method=options.dynamic_method,
            param=options.dynamic_param,
            precision=options.save_precision,
            device=options.device,
            verbose=options.verbose,
            minimal_metadata=options.no_metadata,
        )
    )
    return show_report(report)
