"""`sfumato lora convert`: a LoRA file under the names of another program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from sfumato.cli.options_command import run_with_options
from sfumato.config.base import Metavar, Options, option
from sfumato.config.values import FilePath


class LoraConvertOptions(Options):
    """Writes a LoRA that was trained here or by another program under other names: those of diffusers, so that a
    pipeline's load_lora_weights gives the same images, and of AI-toolkit, which are the same; those of the kohya
    format, which sd-scripts and web UIs read; or those that ComfyUI looks for, where it does not read the file as it
    is. It needs no model. Metadata is kept. Other kinds become a LoRA with `sfumato lora merge FILE --new_rank N`, and
    those that depend on the model's weights (DoRA, GLoRA, (IA)3, OFT, BOFT) with --base_model MODEL, too.
    """

    source: FilePath = option(
        None, "the LoRA to read: a file, or a folder of PEFT or diffusers", positional=True, required=True
    )
    target: FilePath = option(None, "the file to write", positional=True, required=True)
    to: Literal["kohya", "diffusers", "aitoolkit", "comfyui"] = option(
        None, "the program whose names the new file has", required=True
    )
    without: Annotated[str, Metavar("PART,PART")] = option(
        "", "parts to remove, e.g. t5, for which diffusers loads no LoRA"
    )
    family: str | None = option(None, "the model family of the LoRA, where its names do not say it")
    save_precision: Literal["float", "fp16", "bf16"] | None = option(
        None, "precision of the new file; that of the LoRA by default"
    )


def main(argv: Sequence[str]) -> int:
    """Run `sfumato lora convert`."""
    return run_with_options("sfumato lora convert", argv, LoraConvertOptions, run)


def run(options: LoraConvertOptions) -> int:
    from sfumato.tools.export_lora import export_lora

    parts = [part for part in options.without.split(",") if part]
    export_lora(
        options.source,
        options.target,
        program=options.to,
        family=options.family,
        without=parts,
        precision=options.save_precision,
    )
    return 0
