"""sd-scripts' tools for LoRA files, run as `sfumato lora ...`."""

from __future__ import annotations

from typing import Any, Literal

from sfumato.cli.lora_check import LoraCheckOptions, run_check
from sfumato.cli.lora_extract import LoraExtractOptions, run_extract
from sfumato.cli.lora_merge import Lists, LoraMergeOptions, ToolPrecision, run_merge
from sfumato.cli.lora_resize import DynamicMethod, LoraResizeOptions, run_resize
from sfumato.cli.lora_tokens import LoraTokensOptions, run_tokens
from sfumato.cli.options_command import show_report
from sfumato.compat.file_tool import FileTool
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
    return run_merge(LoraMergeOptions.model_construct(**own))


def run_flux_merge(options: FluxMergeOptions) -> int:
    """Without the transformer, its text encoders alone can be targets, whose family the names of the files tell."""
    if options.flux_model is None and (options.clip_l_save_to or options.t5xxl_save_to):
        raise UserError(
            "text encoders are merged together with the transformer",
            code="merge-encoders-without-model",
            fix="--flux_model FILE --save_to FILE",
        )
    return run_merge_tool(options, model="flux_model")


class ExtractOptions(Options):
    """Makes a LoRA of the difference of two checkpoints of Stable Diffusion."""

    v2: bool = option(False, "the checkpoints say it themselves")
    v_parameterization: bool | None = option(None, "the checkpoints say it themselves")
    sdxl: bool = option(False, "the checkpoints say it themselves")
    load_precision: SavePrecision | None = option(None, "precision of the weights in memory")
    save_precision: SavePrecision | None = option(None, "precision of what is written, float by default")
    model_org: ModelPath | None = option(None, "the model before", required=True)
    model_tuned: ModelPath | None = option(None, "the model after", required=True)
    save_to: FilePath | None = option(None, "the file to write", required=True)
    dim: int = option(4, "the rank", ge=1)
    conv_dim: int | None = option(None, "the rank of convolutions, which get nothing by default", ge=1)
    device: str | None = option(None, "the device that computes; the CPU by default")
    clamp_quantile: float = option(0.99, "share of the values that are not cut to the largest of them", gt=0, le=1)
    min_diff: float = option(0.01, "a text encoder whose weights differ by no more gets no layers", ge=0)
    no_metadata: bool = _declare_no_metadata()
    load_original_model_to: str | None = option(None, "device of the model before")
    load_tuned_model_to: str | None = option(None, "device of the model after")


class FluxExtractOptions(Options):
    """Makes a LoRA of the difference of two transformers of FLUX.1."""

    save_precision: SavePrecision | None = option(None, "precision of what is written, float by default")
    model_org: ModelPath | None = option(None, "the transformer before", required=True)
    model_tuned: ModelPath | None = option(None, "the transformer after", required=True)
    mem_eff_safe_open: bool = option(False, "one tensor in memory at a time")
    save_to: FilePath | None = option(None, "the file to write", required=True)
    dim: int = option(4, "the rank", ge=1)
    device: str | None = option(None, "the device that computes; the CPU by default")
    clamp_quantile: float = option(0.99, "share of the values that are not cut to the largest of them", gt=0, le=1)
    no_metadata: bool = _declare_no_metadata()


class ResizeOptions(Options):
    """Writes a LoRA at a smaller rank."""

    save_precision: SavePrecision | None = option(None, "precision of what is written; that of the file by default")
    new_rank: int = option(4, "the new rank; with --dynamic_method the largest", ge=1)
    new_conv_rank: int | None = option(None, "the same of convolutions; --new_rank by default", ge=1)
    save_to: FilePath | None = option(None, "the file to write", required=True)
    model: FilePath | None = option(None, "the LoRA", required=True)
    device: str | None = option(None, "the device that computes; the CPU by default")
    verbose: bool = option(False, "show each layer")
    dynamic_method: DynamicMethod | None = option(None, "give each layer the smallest rank that is enough")
    dynamic_param: float | None = option(None, "the number of --dynamic_method", gt=0)
    svd_lowrank_niter: int = option(2, "passes of a randomized SVD", ge=0)


class DyloraToolOptions(Options):
    """Writes a LoRA for each multiple of a unit of the ranks of a DyLoRA."""

    unit: int | None = option(None, "ranks from one file to the next", required=True, ge=1)
    save_to: FilePath | None = option(None, "the files to write: their rank is added to the name", required=True)
    model: FilePath | None = option(None, "the DyLoRA", required=True)


class InterrogatorOptions(Options):
    """Shows which tokens a LoRA of a text encoder changes most."""

    v2: bool = option(False, "the checkpoint says it itself")
    sd_model: ModelPath | None = option(None, "the checkpoint", required=True)
    model: FilePath | None = option(None, "the LoRA", required=True)
    batch_size: int = option(16, "tokens that are encoded at a time", ge=1)
    clip_skip: int | None = option(None, "compare the output of this layer from the end; the last by default", ge=1)


class FluxConvertOptions(Options):
    """Converts a LoRA of FLUX.1 between the names of AI-toolkit (and diffusers) and those of sd-scripts."""

    src: str = option("ai-toolkit", "the names of the file; they are recognized")
    dst: Literal["ai-toolkit", "sd-scripts"] = option("sd-scripts", "the names to write")
    src_path: FilePath | None = option(None, "the file to read", required=True)
    dst_path: FilePath | None = option(None, "the file to write", required=True)


def run_flux_convert(options: FluxConvertOptions) -> int:
    from sfumato.tools.export_lora import export_lora

    assert options.src_path is not None
    assert options.dst_path is not None
    program = "kohya" if options.dst == "sd-scripts" else "aitoolkit"
    export_lora(options.src_path, options.dst_path, program=program, family="flux")
    return 0


def select_values(options: Options, theme: type[Options], **renamed: Any) -> Any:
    """A command's options from those of a script, where both have them and the script's is not None."""
    values = {**dict(options), **renamed}
    own = {name: values[name] for name in theme.model_fields if values.get(name) is not None}
    return theme.model_construct(**own)


def run_extract_tool(options: Options) -> int:
    return run_extract(select_values(options, LoraExtractOptions))


def run_resize_tool(options: ResizeOptions) -> int:
    return run_resize(select_values(options, LoraResizeOptions, source=options.model))


def run_dylora_tool(options: DyloraToolOptions) -> int:
    from sfumato.tools.adapter_files.divide import divide_ranks

    assert options.model is not None
    assert options.save_to is not None
    assert options.unit is not None
    return show_report(divide_ranks(options.model, options.save_to, options.unit))


def run_interrogator(options: InterrogatorOptions) -> int:
    own = select_values(options, LoraTokensOptions, file=options.model, model=options.sd_model)
    return run_tokens(own)


SAYS_ITSELF = "the checkpoint says it itself"
ONE_AT_A_TIME = "one tensor is in memory at a time anyway"
SUMS = {"precision": IN_FLOAT, "concat": BY_CONCATENATION}
ADAPTER_TOOLS = (
    FileTool(
        name="networks/merge_lora",
        options=MergeOptions,
        run=run_merge_tool,
        no_effect={"v2": SAYS_ITSELF, **SUMS},
    ),
    FileTool(name="networks/sdxl_merge_lora", options=SdxlMergeOptions, run=run_merge_tool, no_effect=SUMS),
    FileTool(
        name="networks/flux_merge_lora",
        options=FluxMergeOptions,
        run=run_flux_merge,
        no_effect={
            **SUMS,
            "mem_eff_load_save": ONE_AT_A_TIME,
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
    FileTool(
        name="networks/extract_lora_from_models",
        options=ExtractOptions,
        run=run_extract_tool,
        no_effect={
            **dict.fromkeys(("v2", "v_parameterization", "sdxl"), SAYS_ITSELF),
            **dict.fromkeys(("load_precision", "load_original_model_to", "load_tuned_model_to"), ONE_AT_A_TIME),
        },
    ),
    FileTool(
        name="networks/flux_extract_lora",
        options=FluxExtractOptions,
        run=run_extract_tool,
        no_effect={"mem_eff_safe_open": ONE_AT_A_TIME},
    ),
    FileTool(
        name="networks/resize_lora",
        options=ResizeOptions,
        run=run_resize_tool,
        no_effect={"svd_lowrank_niter": "the singular values are exact, from matrices of rank x rank"},
    ),
    FileTool(
        name="networks/lora_interrogator",
        options=InterrogatorOptions,
        run=run_interrogator,
        no_effect={"v2": SAYS_ITSELF},
    ),
    FileTool(name="networks/extract_lora_from_dylora", options=DyloraToolOptions, run=run_dylora_tool),
    FileTool(
        name="networks/convert_flux_lora",
        options=FluxConvertOptions,
        run=run_flux_convert,
        no_effect={"src": NAMES_READ},
    ),
)
