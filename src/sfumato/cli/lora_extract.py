"""`sfumato lora extract`: an adapter from the difference of two models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from sfumato.cli.lora_merge import ToolPrecision
from sfumato.cli.lora_resize import DynamicMethod
from sfumato.cli.options_command import run_with_options, show_report
from sfumato.config.base import Options, option
from sfumato.config.values import FilePath, ModelPath


class LoraExtractOptions(Options):
    """Makes a LoRA, or a LoKr, of what training has changed: from a model before and after full training,
    or from a merged model and its base. The weights are read in pairs, so that neither model is in memory.
    """

    model_org: ModelPath = option(None, "the model before: a file, a folder, or a name on the hub", required=True)
    model_tuned: ModelPath = option(None, "the model after", required=True)
    save_to: FilePath = option(None, "the file to write", required=True)
    dim: int = option(16, "the rank; with --dynamic_method the largest", ge=1)
    conv_dim: int | None = option(None, "the rank of convolutions, which get nothing by default", ge=1)
    norms: bool = option(False, "the differences of the denoiser's norm layers, too, under LyCORIS' names")
    network_module: Literal["lora", "lokr"] = option("lora", "low rank, or one Kronecker product in each layer")
    factor: int = option(-1, "with --network_module lokr: as its argument, -1 for about the square root")
    dynamic_method: DynamicMethod | None = option(
        None, "keep singular values above the largest / N, or as many as give a share of norm or sum"
    )
    dynamic_param: float | None = option(None, "the number of --dynamic_method", gt=0)
    clamp_quantile: float = option(1.0, "share of the values that are not cut to the largest of them", gt=0, le=1)
    min_diff: float = option(0.0, "a text encoder whose weights differ by no more gets no layers", ge=0)
    exact: bool = option(False, "compute all singular values; the randomized ones are nearly the same and much faster")
    clip_l: ModelPath | None = option(None, "CLIP-L before, where it has a file of its own")
    clip_g: ModelPath | None = option(None, "CLIP-G before")
    t5xxl: ModelPath | None = option(None, "T5-XXL before")
    gemma2: ModelPath | None = option(None, "Gemma 2 before")
    clip_l_tuned: ModelPath | None = option(None, "CLIP-L after")
    clip_g_tuned: ModelPath | None = option(None, "CLIP-G after")
    t5xxl_tuned: ModelPath | None = option(None, "T5-XXL after")
    gemma2_tuned: ModelPath | None = option(None, "Gemma 2 after")
    save_precision: ToolPrecision = option("float", "precision of what is written")
    device: str = option("cpu", "the device that computes")
    family: str | None = option(None, "the model family, where the files do not say it")
    no_metadata: bool = option(False, "write only what programs need to use the file")


def main(argv: Sequence[str]) -> int:
    """Run `sfumato lora extract`."""
    return run_with_options("sfumato lora extract", argv, LoraExtractOptions, run_extract)


def run_extract(options: LoraExtractOptions) -> int:
    """Show the report; gives the exit code."""
    from sfumato.tools.adapter_files.extract import ExtractRequest, extract_adapter

    report = extract_adapter(
        ExtractRequest(
            original=options.model_org,
            tuned=options.model_tuned,
            output=options.save_to,
            rank=options.dim,
            conv_rank=options.conv_dim,
            norms=options.norms,
            method=options.dynamic_method,
            param=options.dynamic_param,
            kronecker_factor=options.factor if options.network_module == "lokr" else None,
            clamp_quantile=options.clamp_quantile,
            min_diff=options.min_diff,
            exact=options.exact,
            encoders={
                "clip_l": options.clip_l, "clip_g": options.clip_g, "t5xxl": options.t5xxl, "gemma2": options.gemma2,
            },
            tuned_encoders={
                "clip_l": options.clip_l_tuned, "clip_g": options.clip_g_tuned,
                "t5xxl": options.t5xxl_tuned, "gemma2": options.gemma2_tuned,
            },
            precision=options.save_precision,
            device=options.device,
            family=options.family,
            minimal_metadata=options.no_metadata,
        )
    )  # fmt: skip
    return show_report(report)
