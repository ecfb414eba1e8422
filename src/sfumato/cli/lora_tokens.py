"""`sfumato lora tokens`: which tokens an adapter changes most."""

from __future__ import annotations

from collections.abc import Sequence

from sfumato.cli.options_command import run_with_options, show_report
from sfumato.config.base import Options, option
from sfumato.config.values import FilePath, ModelPath, ModelPaths


class LoraTokensOptions(Options):
    """Encodes every token of a text encoder alone, without and with an adapter, and shows those whose output changes
    most: what a file of unknown origin was trained on. The adapter has to be one of a text encoder, too.
    """

    file: FilePath = option(
        None, "the adapter: a file, or a folder of PEFT or diffusers", positional=True, required=True
    )
    model: ModelPath = option(None, "the checkpoint: a file, a folder, or a name on the hub", required=True)
    clip_l: ModelPath | None = option(None, "CLIP-L, where the checkpoint does not hold it")
    clip_g: ModelPath | None = option(None, "the same of CLIP-G")
    t5xxl: ModelPath | None = option(None, "the same of T5-XXL")
    ae: ModelPath | None = option(None, "the autoencoder, where the checkpoint does not hold it; it is not read")
    tokenizer: ModelPaths = option((), "folders of the tokenizers, where their vocabularies are not the usual ones")
    top: int = option(100, "how many tokens are shown", ge=1)
    batch_size: int = option(256, "tokens that are encoded at a time", ge=1)
    clip_skip: int | None = option(None, "compare the output of this layer from the end; the last by default", ge=1)
    family: str | None = option(None, "the model family, where the files do not say it")


def main(argv: Sequence[str]) -> int:
    """Run `sfumato lora tokens`."""
    return run_with_options("sfumato lora tokens", argv, LoraTokensOptions, run_tokens)


def run_tokens(options: LoraTokensOptions) -> int:
    """Show the report; gives the exit code."""
    from sfumato.config import ModelOptions
    from sfumato.tools.adapter_files.tokens import TokensRequest, rank_tokens

    model = ModelOptions(
        pretrained_model_name_or_path=options.model,
        clip_l=options.clip_l,
        clip_g=options.clip_g,
        t5xxl=options.t5xxl,
        ae=options.ae,
        tokenizer=options.tokenizer,
    )
    report = rank_tokens(
        TokensRequest(
            adapter=options.file,
            model=model,
            top=options.top,
            batch_size=options.batch_size,
            layer=options.clip_skip,
            family=options.family,
        )
    )
    return show_report(report)
