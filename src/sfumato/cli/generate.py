"""`sfumato generate`: make pictures. Imports torch only once everything that was given is understood."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.errors import Problems, UserError

if TYPE_CHECKING:
    from sfumato.config import Config
    from sfumato.config.prompts import Prompt

HELP_WORDS = ("--help", "-h")
RULES_OF_TRAINING = ("data", "output", "resolution", "prompts-unused", "samples-without-prompts")
HELP = """usage: sfumato generate --pretrained_model_name_or_path MODEL --prompt "a cat" [--option value ...]

Makes pictures of prompts, with adapter files or without, each with its recipe and this command inside. A prompt takes
the options of a file's line: "a cat --n a dog --w 512 --h 768 --s 30 --d 1 --l 7 --ss euler_a"; what is given beside it
counts where it is silent. Of the options of `sfumato train`, those of the base model and the precision count, too.

"""


@dataclass(frozen=True)
class Word:
    """An option that only this command has. `many`: it takes any number of values."""

    takes: str
    help: str
    kind: Callable[[str], Any]
    many: bool = False


WORDS = {
    "prompt": Word("TEXT", "what to draw, as a line of a file of prompts", str),
    "plain_prompt": Word("", "take --prompt as it stands, without options in it", bool),
    "negative_prompt": Word("TEXT", "what not to draw", str),
    "network_weights": Word("FILE ...", "adapter files", Path, many=True),
    "network_mul": Word("X ...", "their strengths, in their order; 1 where missing", float, many=True),
    "outdir": Word("PATH", "folder for the pictures [default: outputs]", Path),
    "W": Word("N", "width", int),
    "H": Word("N", "height", int),
    "steps": Word("N", "steps from noise to picture", int),
    "scale": Word("X", "classifier-free guidance; 1 for none", float),
    "guidance": Word("X", "embedded guidance, of models that have it", float),
    "cfg_trunc_ratio": Word("X", "classifier-free guidance only before this share of the way", float),
    "renorm_cfg": Word("X", "longest that a guided prediction may be, in lengths of the one for the prompt", float),
    "flow_shift": Word("X", "how far the steps of a flow are moved towards noise", float),
    "float32_parts": Word("NAME ...", "networks kept in float32, as those that trained whole", str, many=True),
}
SPELLINGS = {"ckpt": "pretrained_model_name_or_path", "from_file": "sample_prompts", "sampler": "sample_sampler"}
ALSO = {  # of the vocabulary, the words that matter most
    "pretrained_model_name_or_path": "PATH  the model; also --ckpt",
    "sample_prompts": "FILE  file of prompts: .txt, .toml or .json; also --from_file",
    "seed": "N  seed of the first picture that names none; drawn without it",
    "sample_sampler": "NAME  sampler where a prompt names none; also --sampler",
    "sample_batch_size": "N  how many pictures of equal size, steps and guidance are made together",
    "mixed_precision": "no|fp16|bf16  precision of the computation",
}
PROMPT_FIELDS = {"W": "width", "H": "height", "steps": "sample_steps", "guidance": "guidance_scale"}
SHARED = ("negative_prompt", "scale", "cfg_trunc_ratio", "renorm_cfg", "flow_shift")  # the same name in a prompt


def main(argv: Sequence[str]) -> int:
    """Run `sfumato generate`."""
    if any(word in HELP_WORDS for word in argv):
        print(help_text(), end="")
        return 0
    words, rest = own_words(argv)
    from sfumato.config import load_config

    config = load_config(rest, without=RULES_OF_TRAINING)
    prompts = asked_prompts(words, config)
    networks = asked_networks(words, config)
    from sfumato.cli.main import guarded
    from sfumato.tools.generate import Request, generate_pictures

    request = Request(
        config=config,
        prompts=prompts,
        networks=networks,
        outdir=words.get("outdir", Path("outputs")),
        float32_parts=words.get("float32_parts", ()),
    )

    def run() -> None:
        generate_pictures(request)

    return guarded(run, debug=config.log.debug)


def help_text() -> str:
    rows = {name: f"{word.takes}  {word.help}" if word.takes else word.help for name, word in WORDS.items()} | ALSO
    return HELP + "".join(f"  --{name:<30}{text}\n" for name, text in rows.items())


def own_words(argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The options that only this command has, with their values, and what is left for the vocabulary."""
    from sfumato.config.command_line import is_option

    found: dict[str, Any] = {}
    rest: list[str] = []
    problems = Problems()
    left = list(argv)
    while left:
        word, equals, attached = left.pop(0).partition("=")
        name = SPELLINGS.get(word[2:], word[2:]) if word.startswith("--") else ""
        if name not in WORDS:
            with problems.catch():
                refuse_misspelt(word)
            rest.append((f"--{name}" if name else word) + equals + attached)
            continue
        given = [attached] if equals else []
        while left and not is_option(left[0]) and WORDS[name].takes and (WORDS[name].many or not given):
            given.append(left.pop(0))
        with problems.catch():
            found[name] = value_of(name, WORDS[name], given)
    problems.raise_all()
    return found, rest


def refuse_misspelt(word: str) -> None:
    """UserError for what is nearly a word of this command and nothing in the vocabulary."""
    from sfumato.common.registry import nearest
    from sfumato.config.schema import vocabulary

    name = word.removeprefix("--")
    guess = nearest(name, WORDS) if word.startswith("--") and name not in vocabulary() else None
    if guess and not nearest(name, vocabulary()):
        raise UserError(f"{word} is not an option", fix=f"did you mean --{guess}?")


def value_of(name: str, word: Word, given: Sequence[str]) -> Any:
    """The value of an own option, in its type."""
    if not word.takes:
        if given:
            raise UserError(f"--{name} is a switch and takes no value", fix=f"write --{name}")
        return True
    if not given:
        raise UserError(f"--{name} needs a value", fix=f"write --{name} {word.takes}")
    values = [typed(name, word, text) for text in given]
    return tuple(values) if word.many else values[0]


def typed(name: str, word: Word, text: str) -> Any:
    if word.kind in (int, float) and not re.fullmatch(r"[+-]?\d+" if word.kind is int else NUMBER, text):
        raise UserError(f"--{name}: {text!r} is not a {'whole ' if word.kind is int else ''}number")
    if word.kind is int and int(text) < 1:
        raise UserError(f"--{name}: {text} is below 1")
    if word.kind is Path and not text:
        raise UserError(f"--{name} is empty")
    return word.kind(text)


NUMBER = r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?"


def asked_prompts(words: Mapping[str, Any], config: Config) -> list[Prompt]:
    """What to draw; where a prompt is silent, the options beside it count."""
    from sfumato.config.prompts import MOST_STEPS, Prompt, parse_line, read_prompts

    usual: dict[str, Any] = {PROMPT_FIELDS[name]: words[name] for name in PROMPT_FIELDS if name in words}
    usual |= {name: words[name] for name in SHARED if name in words}
    if usual.get("sample_steps", 1) > MOST_STEPS:
        raise UserError(f"--steps: {words['steps']} is above {MOST_STEPS}")
    if words.get("flow_shift", 1) <= 0:
        raise UserError(f"--flow_shift {words['flow_shift']:g} is not above 0", fix="as --flow_shift 3")
    text, path = words.get("prompt"), config.samples.sample_prompts
    if text is not None and path is not None:
        raise UserError("--prompt and --from_file both say what to draw", fix="give one of them")
    if "plain_prompt" in words and text is None:
        raise UserError("--plain_prompt is about --prompt, which is not given", fix="leave it out")
    if text is not None:
        plain = "plain_prompt" in words
        found = [Prompt(prompt=text) if plain else parse_line(text, where="--prompt")]
    else:
        found = read_prompts(path) if path else []
    if not found:
        raise UserError("there is nothing to draw", fix='give --prompt "a cat", or --from_file prompts.txt')
    return [each.completed(usual) for each in found]


def asked_networks(words: Mapping[str, Any], config: Config) -> list[tuple[Path, float]]:
    """Adapter files with their strengths; the configuration file may name one."""
    paths: tuple[Path, ...] = words.get("network_weights", ())
    if not paths and config.network.network_weights:
        paths = (config.network.network_weights,)
    strengths: tuple[float, ...] = words.get("network_mul", ())
    if len(strengths) > len(paths):
        raise UserError(
            f"--network_mul has {len(strengths)} values for {len(paths)} files of --network_weights",
            fix="give one value for each file, or fewer; missing ones are 1",
        )
    for path in paths:
        if not path.is_file():
            raise UserError(f"--network_weights: {path} does not exist")
    return list(zip(paths, (*strengths, *[1.0] * len(paths)), strict=False))
