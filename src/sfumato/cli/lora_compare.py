"""`sfumato lora compare`: what two adapters have in common."""

from __future__ import annotations

from collections.abc import Sequence

from sfumato.cli.options_command import run_with_options, show_report
from sfumato.config.base import Options, option
from sfumato.config.values import FilePath


class LoraCompareOptions(Options):
    """Compares two adapters of one model, block by block: the norms of their changes, the cosine between them, and how
    far they write to the same outputs and read the same inputs: whether they go together.
    """

    first: FilePath = option(
        None, "an adapter: a file, or a folder of PEFT or diffusers", positional=True, required=True
    )
    second: FilePath = option(None, "the other adapter of the same model", positional=True, required=True)
    family: str | None = option(None, "the model family of the adapters, where their names do not say it")


def main(argv: Sequence[str]) -> int:
    """Run `sfumato lora compare`."""
    return run_with_options("sfumato lora compare", argv, LoraCompareOptions, run)


def run(options: LoraCompareOptions) -> int:
    from sfumato.tools.adapter_files.compare import compare_adapters, render_comparison

    return show_report(render_comparison(compare_adapters(options.first, options.second, options.family)))
