"""sd-scripts' tools for LoRA files, run as `sfumato lora ...`."""

from __future__ import annotations

from typing import Any, Literal

from sfumato.cli.lora_check import LoraCheckOptions, run_check
from sfumato.cli.lora_merge import Lists, LoraMergeOptions, ToolPrecision, run_merge
from sfumato.compat.file_tool import FileTool, show_report
from sfumato.config.base import Options, option
from sfumato.config.values import FilePath, FilePaths, Floats, ModelPath
from sfumato.errors import UserError

SavePrecision = Literal["float", "fp16", "bf16"]
IN_FLOAT = "sums are computed in float32, one tensor at a time, and rounded once"
BY_CONCATENATION = "files are always added up exactly, by concatenation of their ranks"
NAMES_READ = "every program's names are read"


def _declare_models() -> Any:
    return option((), "the LoRA files")


def _declare_ratios() -> Any:
    return option((), "strength of each file, 1 by default")


def _declare_no_metadata() -> Any:
    return option(False, "write only what programs need to use the file")


class MergeOptions(Options):
    """Merges LoRA files into a checkpoint of Stable Diffusion 1 or 2, or into one LoRA."""

    v2: bool = option(False, "the checkpoint says it itself")
    sd_model: ModelPath | None = option(None, "the checkpoint; by default the files become one LoRA")
    save_to: FilePath | None = option(None, "the file to write", required=True)
    models: FilePaths = _declare_models()
    ratios: Floats = _declare_ratios()
    precision: SavePrecision = option("float", "precision of the sums")
    save_precision: SavePrecision | None = option(None, "precision of what is written; as it is by default")
    no_metadata: bool = _declare_no_metadata()
    concat: bool = option(False, "add the files up by concatenation of their ranks")
    shuffle: bool = option(False, "write the ranks in a random order, which changes nothing else")


class SdxlMergeOptions(Options):
    """Merges LoRA files into a checkpoint of Stable Diffusion XL, or into one LoRA."""

    sd_model: ModelPath | None = option(None, "the checkpoint; by default the files become one LoRA")
    save_to: FilePath | None = option(None, "the file to write", required=True)
    models: FilePaths = _declare_models()
    ratios: Floats = _declare_ratios()
    lbws: Lists = option((), "for each file a JSON list of strengths of the UNet's blocks, of 12 or 20 numbers")
    precision: SavePrecision = option("float", "precision of the sums")
    save_precision: SavePrecision | None = option(None, "precision of what is written; as it is by default")
    no_metadata: bool = _declare_no_metadata()
    concat: bool = option(False, "add the files up by concatenation of their ranks")
    shuffle: bool = option(False, "write the ranks in a random order, which changes nothing else")


class FluxMergeOptions(Options):
    """Merges LoRA files into FLUX.1's transformer and its text encoders, or into one LoRA."""

    flux_model: ModelPath | None = option(None, "the transformer; by default the files become one LoRA")
    clip_l: ModelPath | None = option(None, "CLIP-L")
    t5xxl: ModelPath | None = option(None, "T5-XXL")
    save_to: FilePath | None = option(None, "the file to write of the transformer, or of the one LoRA")
    clip_l_save_to: FilePath | None = option(None, "the file to write of CLIP-L")
    t5xxl_save_to: FilePath | None = option(None, "the file to write of T5-XXL")
    loading_device: str = option("cpu", "device on which files are read")
    working_device: str = option("cpu", "device that computes")
    mem_eff_load_save: bool = option(False, "one tensor in memory at a time")
    models: FilePaths = _declare_models()
    ratios: Floats = _declare_ratios()
    precision: ToolPrecision = option("float", "precision of the sums")
    save_precision: ToolPrecision | None = option(None, "precision of what is written; as it is by default")
    no_metadata: bool = _declare_no_metadata()
    concat: bool = option(False, "add the files up by concatenation of their ranks")
    shuffle: bool = option(False, "write the ranks in a random order, which changes nothing else")
    diffusers: bool = option(False, "the files have diffusers' names")


class SvdMergeOptions(Options):
    """Merges LoRA files of any ranks into one of a given rank, the nearest to their sum."""

    save_to: FilePath | None = option(None, "the file to write", required=True)
    models: FilePaths = _declare_models()
    ratios: Floats = _declare_ratios()
    lbws: Lists = option((), "for each file a JSON list of strengths of the UNet's blocks")
    new_rank: int = option(4, "rank of the result", ge=1)
    new_conv_rank: int | None = option(None, "rank of convolutions; --new_rank by default", ge=1)
    device: str | None = option(None, "the device that computes; the CPU by default")
    precision: SavePrecision = option("float", "precision of the sums")
    save_precision: SavePrecision | None = option(None, "precision of what is written; as it is by default")
    no_metadata: bool = _declare_no_metadata()


def run_merge_tool(options: Options, *, model: str = "sd_model", **renamed: str) -> int:
    """Merge with the options of a script. model: its option of the checkpoint. renamed: our option -> its."""
    values = dict(options)
    own = {name: values[name] for name in LoraMergeOptions.model_fields if name in values and name != "model"}
    own |= {"files": values["models"], "model": values.get(model)}
    if own.get("device") is None:
        own.pop("device", None)
    if not values["models"]:
        raise UserError("--models is missing", code="merge-models-missing", fix="--models FILE ...")
    return show_report(run_merge(LoraMergeOptions.model_construct(**own)))


def run_flux_merge(options: FluxMergeOptions) -> int:
    """Without the transformer, its text encoders alone can be targets, whose family the names of the files tell."""
    if options.flux_model is None and (options.clip_l_save_to or options.t5xxl_save_to):
        raise UserError(
            "text encoders are merged together with the transformer",
            code="merge-encoders-without-model",
            fix="--flux_model FILE --save_to FILE",
        )
    return run_merge_tool(options, model="flux_model")


SUMS = {"precision": IN_FLOAT, "concat": BY_CONCATENATION}
ADAPTER_TOOLS = (
    FileTool(
        name="networks/merge_lora",
        options=MergeOptions,
        run=run_merge_tool,
        no_effect={"v2": "the checkpoint says it itself", **SUMS},
    ),
    FileTool(name="networks/sdxl_merge_lora", options=SdxlMergeOptions, run=run_merge_tool, no_effect=SUMS),
    FileTool(
        name="networks/flux_merge_lora",
        options=FluxMergeOptions,
        run=run_flux_merge,
        no_effect={
            **SUMS,
            "mem_eff_load_save": "one tensor is in memory at a time anyway",
            "loading_device": IN_FLOAT,
            "working_device": IN_FLOAT,
            "diffusers": NAMES_READ,
        },
    ),
    FileTool(
        name="networks/svd_merge_lora", options=SvdMergeOptions, run=run_merge_tool, no_effect={"precision": IN_FLOAT}
    ),
    FileTool(
        name="networks/check_lora_weights",
        options=LoraCheckOptions,
        run=run_check,
        short={"-s": "--show_all_keys"},
    ),
)
