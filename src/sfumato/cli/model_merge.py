"""`sfumato model merge`: the weighted sum of checkpoints."""

from __future__ import annotations

from collections.abc import Sequence

from sfumato.cli.lora_merge import ToolPrecision
from sfumato.cli.options_command import run_with_options, show_report
from sfumato.config.base import Options, option
from sfumato.config.values import FilePath, FilePaths, Floats


class ModelMergeOptions(Options):
    """Adds checkpoints of one family up, one tensor at a time. What a model lacks counts as the first one has it."""

    models: FilePaths = option((), "the checkpoints, the first one's layout is written", positional=True, required=True)
    save_to: FilePath = option(None, "the file to write", required=True)
    ratios: Floats = option((), "weight of each; equal ones that sum to 1 by default")
    unet_only: bool = option(False, "write the denoiser alone")
    save_precision: ToolPrecision | None = option(None, "precision of what is written; that of the first by default")
    show_skipped: bool = option(False, "name the tensors that only some of the models have")


def main(argv: Sequence[str]) -> int:
    """Run `sfumato model merge`."""
    return run_with_options("sfumato model merge", argv, ModelMergeOptions, run_model_merge)


def run_model_merge(options: ModelMergeOptions) -> int:
    """Show the report; gives the exit code."""
    from sfumato.tools.model_merge import SumRequest, merge_models

    report = merge_models(
        SumRequest(
            models=options.models,
            output=options.save_to,
            ratios=options.ratios,
            denoiser_only=options.unet_only,
            precision=options.save_precision,
            show_skipped=options.show_skipped,
        )
    )
    return show_report(report)
