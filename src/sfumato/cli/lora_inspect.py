"""`sfumato lora inspect`: what an adapter file does to which blocks."""

from __future__ import annotations

from collections.abc import Sequence

from sfumato.cli.options_command import run_with_options
from sfumato.config.base import Options, option
from sfumato.config.values import FilePath


class LoraInspectOptions(Options):
    """Shows what an adapter file is and does: for each block the rank, alpha, norm and effective rank of the change,
    and what is wrong: changes that are 0, tensors that are not used, names that no model has.
    """

    file: FilePath = option(
        None, "the adapter: a file, or a folder of PEFT or diffusers", positional=True, required=True
    )
    html: FilePath | None = option(None, "also write a page with charts; it needs no other file")
    family: str | None = option(None, "the model family of the adapter, where its names do not say it")


def main(argv: Sequence[str]) -> int:
    """Run `sfumato lora inspect`."""
    return run_with_options("sfumato lora inspect", argv, LoraInspectOptions, run)


def run(options: LoraInspectOptions) -> int:
    from sfumato.tools.adapter_files.inspect import inspect_adapter, render_text

    if options.html is not None:
        from sfumato.tools.adapter_files.page import check_page_path

        check_page_path(options.html)
    facts = inspect_adapter(options.file, options.family)
    print("\n".join(render_text(facts)))
    if options.html is not None:
        from sfumato.tools.adapter_files.page import write_adapter_page

        print(write_adapter_page(facts, options.html))
    return 0
