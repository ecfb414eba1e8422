"""sd-scripts' tools for checkpoints, run as `sfumato model ...` and `sfumato metadata ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from sfumato.cli.lora_merge import ToolPrecision
from sfumato.cli.model_merge import ModelMergeOptions, run_model_merge
from sfumato.cli.options_command import show_report
from sfumato.compat.file_tool import FileTool
from sfumato.config.base import Options, option
from sfumato.config.values import FilePath, FilePaths, Floats, ModelPath
from sfumato.errors import UserError

Plain = Literal["float", "fp16", "bf16"]
IN_FLOAT32 = "sums are computed in float32 on the CPU, one tensor at a time, and rounded once"
TOLD_BY_MODEL = "the model says it itself"
SD3_PREFIXES = {  # option -> what keys of its file get, as in published files of the whole model
    "dit": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "clip_l": "text_encoders.clip_l.transformer.",
    "clip_g": "text_encoders.clip_g.transformer.",
    "t5xxl": "text_encoders.t5xxl.transformer.",
}


class SumOptions(Options):
    """Adds checkpoints up."""

    models: FilePaths = option((), "the checkpoints")
    output: FilePath | None = option(None, "the file to write", required=True)
    ratios: Floats = option((), "weight of each; equal ones that sum to 1 by default")
    unet_only: bool = option(False, "write the denoiser alone")
    device: str = option("cpu", "device that computes")
    precision: Plain = option("float", "precision of the sums")
    saving_precision: Plain = option("float", "precision of what is written")
    show_skipped: bool = option(False, "name the tensors that only some of the models have")


class StableConvertOptions(Options):
    """Converts Stable Diffusion between a checkpoint and a folder of diffusers; a target with a suffix is a file."""

    v1: bool = option(False, "the model is version 1")
    v2: bool = option(False, "the model is version 2")
    unet_use_linear_projection: bool = option(False, "the folder has linear projections")
    fp16: bool = option(False, "as --save_precision_as fp16")
    bf16: bool = option(False, "as --save_precision_as bf16")
    float: bool = option(False, "as --save_precision_as float")
    save_precision_as: Literal["no", "fp16", "bf16", "float"] = option("no", "precision of what is written")
    epoch: int = option(0, "epoch in the file's metadata", ge=0)
    global_step: int = option(0, "step in the file's metadata", ge=0)
    metadata: str | None = option(None, "further metadata: JSON")
    variant: str | None = option(None, "ending of the folder's file names")
    reference_model: str | None = option(None, "where scheduler and tokenizer come from")
    use_safetensors: bool = option(False, "write safetensors files into the folder")
    model_to_load: ModelPath | None = option(None, "the model", positional=True, required=True)
    model_to_save: FilePath | None = option(None, "the file or folder to write", positional=True, required=True)


class FluxFileOptions(Options):
    """Writes the transformer of a FLUX.1 folder of diffusers as one file with the original keys."""

    diffusers_path: ModelPath | None = option(None, "the folder, or one of its shards", required=True)
    save_to: FilePath | None = option(None, "the file to write", required=True)
    mem_eff_load_save: bool = option(False, "one tensor in memory at a time")
    save_precision: ToolPrecision | None = option(None, "precision of what is written; as it is by default")


class Sd3JoinOptions(Options):
    """Makes one file of the networks of Stable Diffusion 3."""

    dit: FilePath | None = option(None, "the transformer", required=True)
    vae: FilePath | None = option(None, "the autoencoder")
    clip_l: FilePath | None = option(None, "CLIP-L")
    clip_g: FilePath | None = option(None, "CLIP-G")
    t5xxl: FilePath | None = option(None, "T5-XXL")
    output: FilePath = option("merged_model.safetensors", "the file to write")
    device: str = option("cpu", "device on which files are read")
    save_precision: ToolPrecision | None = option(None, "precision of what is written; as it is by default")


class ShowOptions(Options):
    """Shows the metadata of a safetensors file."""

    model: FilePath | None = option(None, "the file", required=True)


def run_sum(options: SumOptions) -> int:
    if not options.models:
        raise UserError("--models is missing", code="sum-models-missing", fix="--models FILE FILE ...")
    own = ModelMergeOptions.model_construct(
        models=options.models,
        save_to=options.output,
        ratios=options.ratios,
        unet_only=options.unet_only,
        save_precision=options.saving_precision,
        show_skipped=options.show_skipped,
    )
    return run_model_merge(own)


def run_stable_convert(options: StableConvertOptions) -> int:
    from sfumato.common.json_toml import decode_json

    given = [name for name in ("fp16", "bf16", "float") if vars(options)[name]]
    precision = given[0] if given else options.save_precision_as.replace("no", "") or None
    try:
        more: Any = decode_json(options.metadata or "{}")
    except ValueError:
        more = None
    if not isinstance(more, dict):
        raise UserError(
            "--metadata is no JSON object", code="convert-metadata-invalid", fix="""--metadata '{"a": "b"}'"""
        )
    counts = {"ss_epoch": str(options.epoch), "ss_steps": str(options.global_step)}
    metadata = {**counts, **{str(name): str(value) for name, value in more.items()}}
    assert options.model_to_load is not None
    assert options.model_to_save is not None
    return _convert(options.model_to_load, options.model_to_save, precision, metadata)


def run_flux_file(options: FluxFileOptions) -> int:
    assert options.diffusers_path is not None
    assert options.save_to is not None
    path = Path(options.diffusers_path)
    folder = path.parent if path.is_file() else path
    if path.is_file() and not (folder / "config.json").is_file():
        raise UserError(
            f"{path} is no file of a folder in diffusers' layout: there is no config.json beside it",
            code="flux-folder-missing",
            fix="--diffusers_path FOLDER",
        )
    return _convert(str(folder), options.save_to, options.save_precision, {})


def _convert(source: str, output: Path, precision: str | None, metadata: dict[str, str]) -> int:
    from sfumato.tools.model_convert import ConvertRequest, convert_model

    return show_report(
        convert_model(ConvertRequest(source=source, output=output, precision=precision, metadata=metadata))
    )


def run_sd3_join(options: Sd3JoinOptions) -> int:
    from sfumato.tools.model_convert import check_networks, join_networks

    assert options.dit is not None
    given = {name: vars(options)[name] for name in SD3_PREFIXES if vars(options)[name]}
    check_networks(options.dit, {name: path for name, path in given.items() if name not in ("dit", "vae")}, "sd3")
    parts = {SD3_PREFIXES[name]: path for name, path in given.items()}
    return show_report(join_networks(parts, Path(options.output), options.save_precision))


def run_show(options: ShowOptions) -> int:
    from sfumato.tools.file_metadata import format_metadata

    assert options.model is not None
    return show_report([format_metadata(options.model)])


MODEL_TOOLS = (
    FileTool(
        name="tools/merge_models",
        options=SumOptions,
        run=run_sum,
        no_effect={"device": IN_FLOAT32, "precision": IN_FLOAT32},
    ),
    FileTool(
        name="tools/convert_diffusers20_original_sd",
        options=StableConvertOptions,
        run=run_stable_convert,
        no_effect={
            **dict.fromkeys(("v1", "v2", "unet_use_linear_projection"), TOLD_BY_MODEL),
            "variant": "files have the names that diffusers looks for first",
            "reference_model": "scheduler and tokenizer follow from the model",
            "use_safetensors": "folders always have safetensors files",
        },
    ),
    FileTool(
        name="tools/convert_diffusers_to_flux",
        options=FluxFileOptions,
        run=run_flux_file,
        no_effect={"mem_eff_load_save": "one tensor is in memory at a time anyway"},
    ),
    FileTool(
        name="tools/merge_sd3_safetensors",
        options=Sd3JoinOptions,
        run=run_sd3_join,
        no_effect={"device": "one tensor is in memory at a time, on the CPU"},
    ),
    FileTool(name="tools/show_metadata", options=ShowOptions, run=run_show),
)
