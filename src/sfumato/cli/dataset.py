"""`sfumato dataset`: cache and inspect datasets without training. Imports torch only where a model is loaded."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.common.registry import did_you_mean, nearest
from sfumato.errors import UserError

if TYPE_CHECKING:
    from sfumato.config import Config

HELP = ("--help", "-h")
RULES_OF_TRAINING = ("model", "data", "output")
DISK = {"cache_latents": "cache_latents_to_disk", "cache_text_encoder_outputs": "cache_text_encoder_outputs_to_disk"}
CACHE_WORDS = {
    "--stats": "count what lies in the cache, and say who needs it",
    "--verify": "read every entry; with a dataset given, every picture, too",
    "--prune": "say what no current dataset needs, ask, and drop it",
    "--yes": "with --prune: do not ask",
    "--unused_for": "DAYS  with --prune: datasets not cached for that long do not count as current",
    "--shard": "I/N  make the I-th of N parts, for several machines without a common folder",
}
CACHE_HELP = """usage: sfumato dataset cache [--stats | --verify | --prune] [--option value ...]

Fills the caches of latents and of text without training, and looks after them. Takes the options of `sfumato train`;
give those of the training, --mixed_precision above all, since an entry is made for the weights as they are loaded.
Both caches are filled unless --cache_latents or --cache_text_encoder_outputs names one. Several processes share the
work. Machines with caches of their own make a part each: copy all their files of `shards` into one folder.

"""

INSPECT_WORDS = {
    "--html": "FILE  write a page with pictures as the model sees them; it needs no other file",
    "--pictures": "N  how many of each folder the page shows [default: 48]",
    "--headers_only": "do not decode every picture, which finds damage but takes a while for many",
}
INSPECT_HELP = """usage: sfumato dataset inspect FOLDER|FILE.toml [--option value ...]

Says of each folder how many images, captions and tags there are, which files are damaged or have no caption, which
captions are cut, and how pictures fall into buckets. Changes nothing. Takes the options of `sfumato train` about data,
--resolution above all; --tokenizer or a model's folder counts that model's tokens, CLIP's are counted without.

"""


def main(argv: Sequence[str]) -> int:
    """Run `sfumato dataset COMMAND`."""
    if not argv or argv[0] in HELP:
        lines = [f"  {name:<9}{(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
        print("\n".join(["usage: sfumato dataset COMMAND [--option value ...]", "", *lines]))
        return 0
    if argv[0] not in COMMANDS:
        raise UserError(f"sfumato dataset has no command {argv[0]!r}", fix=did_you_mean(argv[0], COMMANDS))
    return COMMANDS[argv[0]](argv[1:])


def cache(argv: Sequence[str], *, kinds: Sequence[str] = (), defaults: Mapping[str, Any] | None = None) -> int:
    """Fill the caches without training, or count, check or clear them."""
    if any(word in HELP for word in argv):
        print(CACHE_HELP + "\n".join(f"  {word:<16}{text}" for word, text in CACHE_WORDS.items()))
        return 0
    words, rest = own_words(argv, CACHE_WORDS, ("--unused_for", "--shard"))
    task = chosen_task(words)
    config = cache_config(rest, kinds, defaults or {}, upkeep=task is not None)
    from sfumato.cli.main import guarded
    from sfumato.tools import dataset_cache

    def fill() -> None:
        dataset_cache.fill_caches(config, machine=machine_of(words.get("--shard"))).close()

    run: dict[str | None, Callable[[], None]] = {
        "--stats": lambda: dataset_cache.show_stats(config),
        "--verify": lambda: dataset_cache.verify(config),
        "--prune": lambda: dataset_cache.prune_cache(config, yes="--yes" in words, unused_days=words_days(words)),
        None: fill,
    }
    return guarded(run[task], debug=config.log.debug)


def inspect(argv: Sequence[str]) -> int:
    """Say what is in a dataset and what training would refuse, as text and as a page."""
    if any(word in HELP for word in argv):
        print(INSPECT_HELP + "\n".join(f"  {word:<16}{text}" for word, text in INSPECT_WORDS.items()))
        return 0
    words, rest = own_words(argv, INSPECT_WORDS, ("--html", "--pictures"))
    count = words.get("--pictures", "48")
    if not re.fullmatch(r"\d+", count):
        raise UserError(f"--pictures: {count!r} is not a number", fix="as --pictures 100")
    config = inspect_config(rest)
    from sfumato.cli.main import guarded
    from sfumato.tools.dataset_inspect import inspect_dataset

    def run() -> None:
        inspect_dataset(
            config,
            html=Path(words["--html"]) if "--html" in words else None,
            pictures=int(count),
            decoding="--headers_only" not in words,
        )

    return guarded(run, debug=config.log.debug)


def inspect_config(argv: Sequence[str]) -> Config:
    """The options; a folder may stand in the place of --train_data_dir, and a size is assumed where none is given."""
    from sfumato.config import load_config

    words = ["--train_data_dir", *argv] if argv and not argv[0].startswith("-") else list(argv)
    if len(words) == len(argv) + 1 and words[1].endswith((".toml", ".json")):
        words[0] = "--dataset_config"
    without = ("model", "output", "resolution")
    config = load_config(words, without=without)
    if config.dataset.dataset_config is None and config.buckets.resolution is None:
        print("no --resolution given: buckets are those of 1024")
        return load_config(words, defaults={"resolution": (1024, 1024), "enable_bucket": True}, without=without)
    return config


def chosen_task(words: Mapping[str, str]) -> str | None:
    """The one thing to do, None for filling; UserError where words do not go together."""
    tasks = [word for word in ("--stats", "--verify", "--prune") if word in words]
    if len(tasks) > 1:
        raise UserError(f"{' and '.join(tasks)} are two different things to do", fix="give one of them")
    for word in ("--yes", "--unused_for"):
        if word in words and tasks != ["--prune"]:
            raise UserError(f"{word} only goes with --prune", fix=f"leave {word} out")
    if "--shard" in words and tasks:
        raise UserError(f"--shard is for filling, not for {tasks[0]}", fix="leave --shard out")
    return tasks[0] if tasks else None


def words_days(words: Mapping[str, str]) -> float | None:
    text = words.get("--unused_for")
    if text is not None and not re.fullmatch(r"\d+(\.\d+)?", text):
        raise UserError(f"--unused_for: {text!r} is not a number of days", fix="as --unused_for 30")
    return None if text is None else float(text)


def machine_of(text: str | None) -> tuple[int, int]:
    """`2/4` -> (1, 4): which part, from 0, of how many."""
    found = re.fullmatch(r"(\d+)/(\d+)", text or "1/1")
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(f"--shard: {text!r} is not a part", fix="as --shard 1/4, 2/4, 3/4 and 4/4 for four machines")
    return int(found[1]) - 1, int(found[2])


def cache_config(argv: Sequence[str], kinds: Sequence[str], defaults: Mapping[str, Any], *, upkeep: bool) -> Config:
    """The options, with the wanted caches on disk; looking after a cache needs neither model nor data."""
    from sfumato.config import load_config

    without = RULES_OF_TRAINING if upkeep else ("output",)
    config = load_config(argv, defaults=defaults, without=without)
    if upkeep:
        return config
    asked = kinds or [kind for kind in DISK if config.value(kind)] or list(DISK)
    return load_config(argv, defaults={**defaults, **{DISK[kind]: True for kind in asked}}, without=without)


def own_words(
    argv: Sequence[str], known: Mapping[str, str], with_value: Sequence[str]
) -> tuple[dict[str, str], list[str]]:
    """The words that only this command has, with their values, and what is left for the vocabulary."""
    from sfumato.config.schema import vocabulary

    words: dict[str, str] = {}
    rest: list[str] = []
    left = list(argv)
    while left:
        word, equals, value = left.pop(0).partition("=")
        if word in known:
            if word in with_value and not equals:
                if not left or left[0].startswith("--"):
                    raise UserError(f"{word} needs a value", fix=f"write {word} {known[word].split()[0]}")
                value = left.pop(0)
            words[word] = value
            continue
        guess = nearest(word, known) if word.startswith("--") and word[2:] not in vocabulary() else None
        if guess and not nearest(word[2:], vocabulary()):
            raise UserError(f"{word} is not an option", fix=f"did you mean {guess}?")
        rest.append(word + equals + value)
    return words, rest


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"inspect": inspect, "cache": cache}
