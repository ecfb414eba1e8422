"""The secrets that a run was given, and their removal from everything that is written or shown."""

from __future__ import annotations

import os
from collections.abc import Iterable

from sfumato.config.schema import Config, vocabulary

ENVIRONMENT = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")  # where the libraries look for theirs
SHORTEST = 6  # characters; anything below is a word that messages may need
HIDDEN = "(secret)"


def secrets_of(config: Config) -> frozenset[str]:
    """The values of all secret options and of the environment's."""
    given = [config.value(name) for name, option in vocabulary().items() if option.secret]
    found = {secret.get_secret_value() for secret in given if secret is not None}
    found |= {os.environ.get(name, "") for name in ENVIRONMENT}
    return frozenset(secret for secret in found if len(secret) >= SHORTEST)


def scrubbed(text: str, secrets: Iterable[str]) -> str:
    """The text without the secrets; the longest goes first, as one may be part of another."""
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text
