"""The secrets of a run, and their removal from everything that is written or shown."""

from __future__ import annotations

import configparser
import netrc
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePath

from sfumato.common.files import open_file
from sfumato.config.schema import Config, vocabulary
from sfumato.errors import UserError

SECRET_VARIABLES = (  # read by huggingface_hub, libraries around it, and wandb
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN", "HUGGINGFACEHUB_API_TOKEN", "WANDB_API_KEY",
)  # fmt: skip
SHORTEST_SECRET = 6  # characters; a shorter one could be a word of a message
REDACTED = "(secret)"
SECRET_NAME = re.compile(r"(?:token|api_?key|secret|password)$")  # of an option, also a misspelled one
SECRET_SHAPES = (  # what is secret wherever it stands
    re.compile(r"\bhf_[A-Za-z0-9]{30,}\b"),
    re.compile(r"(?<=:/)(?P<slash>/?)[^/\s@]+(?=@)"),  # user and password in a URL
    re.compile(r"(?P<name>[?&](?:access_)?(?:token|key|api_key)=)[^&\s'\"]+"),
)


def collect_secrets(config: Config) -> frozenset[str]:
    """The values of all secret options, and those of this computer that libraries read by themselves."""
    options = [config.value(name) for name, option in vocabulary().items() if option.secret]
    secrets = {secret.get_secret_value() for secret in options if secret is not None}
    return frozenset(secret for secret in secrets if len(secret) >= SHORTEST_SECRET) | collect_machine_secrets()


def collect_machine_secrets() -> frozenset[str]:
    """From environment variables, `hf auth login` and `wandb login`."""
    found = [os.environ.get(name, "") for name in SECRET_VARIABLES]
    found += [*read_hub_tokens(), *read_wandb_keys()]
    return frozenset(secret for secret in found if len(secret) >= SHORTEST_SECRET)


def read_hub_tokens() -> Iterator[str]:
    """What `hf auth login` has stored: the token in use, and those that were used before."""
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface"))
    token = Path(os.environ.get("HF_TOKEN_PATH") or home / "token").expanduser()
    yield read_small_file(token).strip()
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    try:
        parser.read_string(
            read_small_file(Path(os.environ.get("HF_STORED_TOKENS_PATH") or token.parent / "stored_tokens"))
        )
    except configparser.Error:
        return
    for section in parser.sections():
        yield from (value for name, value in parser.items(section) if name == "hf_token")


def read_wandb_keys() -> Iterator[str]:
    """What `wandb login` has stored, for any host of wandb."""
    for name in (os.environ.get("NETRC") or "~/.netrc", "~/_netrc"):
        try:
            hosts = netrc.netrc(os.path.expanduser(name)).hosts  # noqa: PTH111 -- netrc takes a text
        except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
            continue
        yield from (password for host, (_, _, password) in hosts.items() if "wandb" in host and password)


def read_small_file(path: Path) -> str:
    """Empty where it cannot be read."""
    try:
        with open_file(path) as file:
            return file.read(1 << 16).decode(errors="replace")
    except (OSError, UserError):
        return ""


def find_secret_words(words: Sequence[str]) -> frozenset[str]:
    """The values in the words of a command line whose names say that they are secret, with dashes or without."""
    found: list[str] = []
    for number, word in enumerate(words):
        name, equals, value = word.partition("=")
        if SECRET_NAME.search(name.replace("-", "_").lower()):
            found.append(value if equals else "".join(words[number + 1 : number + 2]))
    return frozenset(secret for secret in found if len(secret) >= SHORTEST_SECRET and not secret.startswith("--"))


def redact(text: str, secrets: Iterable[str]) -> str:
    """The text with its secrets replaced, longest first, since one may contain another; also those known by shape."""
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, REDACTED)
    for shape in SECRET_SHAPES:
        text = shape.sub(lambda match: "".join(match.groupdict().values()) + REDACTED, text)
    return text


def describe_exposed(config: Config) -> tuple[list[str], list[str]]:
    """(warnings, notes) about what a command line shows of a run that wandb shows to others."""
    if config.log.log_with not in ("wandb", "all"):
        return [], []
    typed = [name for name in vocabulary() if config.source(name) == "command line"]
    secret = [f"--{name}" for name in typed if vocabulary()[name].secret]
    paths = [f"--{name}" for name in typed if has_absolute_path(config.value(name))]
    where, public = "on the command line", "can become public with wandb, though sfumato does not send it there"
    warnings = [f"{name} {where} {public}; put it in a file for --config_file" for name in secret]
    notes = [f"the absolute path of {name} {where} {public}; a relative path says less" for name in paths]
    return warnings, notes


def has_absolute_path(value: object) -> bool:
    values = value if isinstance(value, tuple) else (value,)
    return any(isinstance(each, PurePath) and each.is_absolute() for each in values)
