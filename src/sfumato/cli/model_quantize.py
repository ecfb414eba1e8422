"""`sfumato model quantize`: a checkpoint whose layers are stored in eight bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from sfumato.cli.lora_merge import ToolPrecision
from sfumato.cli.options_command import run_with_options, show_report
from sfumato.config.base import Metavar, Options, option
from sfumato.config.values import FilePath, ModelPath


class ModelQuantizeOptions(Options):
    """Writes a checkpoint with the layers of its repeated blocks in eight bits, one tensor at a time, and says what
    that changes in each block. Norms, biases, embeddings and the layers outside of the blocks are copied. For ComfyUI
    float8 has one scale for each weight and int8 one for each output channel; both are read here, too, and the latter
    is what --int8_compute multiplies with (rotated: beside --rotate_inputs). For training the scales are finer: those
    of --fp8_scaled and --int8_base, of which no copy is then made when the model is loaded.
    """

    source: ModelPath = option(None, "the checkpoint: one file", positional=True, required=True)
    save_to: FilePath = option(None, "the file to write", required=True)
    bits: Literal["fp8", "int8", "int8_rotated"] = option(
        "fp8", "int8_rotated: input channels are rotated before, so that a few large ones cost less precision"
    )
    to: Literal["comfyui", "training"] = option("comfyui", "who reads the file")
    parts: Annotated[str, Metavar("PART,PART")] = option("denoiser", "the networks whose layers are stored so")
    save_precision: ToolPrecision | None = option(None, "precision of all other tensors; as it is by default")
    verbose: bool = option(False, "show the error of every layer, not of the worst alone")
    family: str | None = option(None, "the model family, where the file does not say it")


def main(argv: Sequence[str]) -> int:
    """Run `sfumato model quantize`."""
    return run_with_options("sfumato model quantize", argv, ModelQuantizeOptions, run)


def run(options: ModelQuantizeOptions) -> int:
    from sfumato.tools.model_quantize import QuantizeRequest, quantize_model

    request = QuantizeRequest(
        source=options.source,
        output=options.save_to,
        bits=options.bits,
        program=options.to,
        parts=[part for part in options.parts.split(",") if part],
        precision=options.save_precision,
        family=options.family,
        verbose=options.verbose,
    )
    return show_report(quantize_model(request))
