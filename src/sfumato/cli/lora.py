"""`sfumato lora`: tools for adapter files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from sfumato.cli.dataset import own_words
from sfumato.common.registry import did_you_mean
from sfumato.errors import UserError

HELP = ("--help", "-h")
FORMATS = ("diffusers",)
EXPORT_WORDS = {
    "--to": "FORMAT  whose names the new file has: diffusers, whose pipelines load it",
    "--without": "PART,PART  parts to leave out, as t5, for which diffusers loads no LoRA",
    "--family": "NAME  the kind of model that the LoRA is for, where its names do not say it",
    "--save_precision": "float|fp16|bf16  the type of the numbers [default: as they are]",
}
EXPORT_HELP = """usage: sfumato lora export IN OUT --to diffusers [--option value ...]

Writes a LoRA that was trained here, or by another program in the field's format, under the names of diffusers, so that
a pipeline's load_lora_weights gives the same pictures. It needs no model. Metadata is kept.

"""


def main(argv: Sequence[str]) -> int:
    """Run `sfumato lora COMMAND`."""
    if not argv or argv[0] in HELP:
        lines = [f"  {name:<9}{(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
        print("\n".join(["usage: sfumato lora COMMAND ...", "", *lines]))
        return 0
    if argv[0] not in COMMANDS:
        raise UserError(f"sfumato lora has no command {argv[0]!r}", fix=did_you_mean(argv[0], COMMANDS))
    return COMMANDS[argv[0]](argv[1:])


def export(argv: Sequence[str]) -> int:
    """Write a LoRA under the names of another program."""
    if any(word in HELP for word in argv):
        print(EXPORT_HELP + "\n".join(f"  {word:<18}{text}" for word, text in EXPORT_WORDS.items()))
        return 0
    words, rest = own_words(argv, EXPORT_WORDS, tuple(EXPORT_WORDS))
    unknown = [word for word in rest if word.startswith("--")]
    if unknown:
        raise UserError(f"sfumato lora export has no option {unknown[0]}", fix=did_you_mean(unknown[0], EXPORT_WORDS))
    if len(rest) != 2:
        raise UserError(
            f"two files are expected, the LoRA and the one to write; {len(rest)} given",
            fix="sfumato lora export my.safetensors mine-diffusers.safetensors --to diffusers",
        )
    if words.get("--to") not in FORMATS:
        raise UserError(f"--to: {words.get('--to', 'nothing')!r} is no known format", fix="--to diffusers")
    precision = words.get("--save_precision")
    if precision not in (None, "float", "fp16", "bf16"):
        raise UserError(f"--save_precision: {precision!r} is not known", fix="one of float, fp16, bf16")
    from sfumato.tools.export_lora import export_lora

    parts = [part for part in words.get("--without", "").split(",") if part]
    export_lora(Path(rest[0]), Path(rest[1]), family=words.get("--family"), without=parts, precision=precision)
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"export": export}
