"""`sfumato model convert`: a model between a single file and a folder of diffusers."""

from __future__ import annotations

from collections.abc import Sequence

from sfumato.cli.lora_merge import ToolPrecision
from sfumato.cli.options_command import run_with_options, show_report
from sfumato.config.base import Options, option
from sfumato.config.values import FilePath, ModelPath


class ModelConvertOptions(Options):
    """Writes a model in another layout, one tensor at a time: a path with a suffix is a single file with the original
    keys, any other a folder of diffusers. Of models whose text encoders are files of their own, the denoiser's file is
    written.
    """

    source: ModelPath = option(
        None, "the model: a file, a folder, or a name on the hub", positional=True, required=True
    )
    target: FilePath = option(None, "the file or folder to write", positional=True, required=True)
    save_precision: ToolPrecision | None = option(None, "precision of what is written; as it is by default")
    tokenizer: str | None = option(None, "folder of the tokenizer, where its vocabulary is not the usual one")
    family: str | None = option(None, "the model family, where the files do not say it")


def main(argv: Sequence[str]) -> int:
    """Run `sfumato model convert`."""
    return run_with_options("sfumato model convert", argv, ModelConvertOptions, run)


def run(options: ModelConvertOptions) -> int:
    from sfumato.config import ModelOptions
    from sfumato.tools.model_convert import ConvertRequest, convert_model

    folders = tuple(each for each in (options.tokenizer or "").split(",") if each)
    request = ConvertRequest(
        source=options.source,
        output=options.target,
        precision=options.save_precision,
        options=ModelOptions(tokenizer=folders),
        family=options.family,
    )
    return show_report(convert_model(request))
