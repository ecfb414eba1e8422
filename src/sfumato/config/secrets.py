"""The secrets of a run, and their removal from everything that is written or shown."""

from __future__ import annotations

import os
from collections.abc import Iterable

from sfumato.config.schema import Config, vocabulary

SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")  # read by huggingface_hub and wandb
SHORTEST_SECRET = 6  # characters; a shorter one could be a word of a message
REDACTED = "(secret)"


def collect_secrets(config: Config) -> frozenset[str]:
    """The values of all secret options and of the environment variables with secrets."""
    options = [config.value(name) for name, option in vocabulary().items() if option.secret]
    secrets = {secret.get_secret_value() for secret in options if secret is not None}
    secrets |= {os.environ.get(name, "") for name in SECRET_VARIABLES}
    return frozenset(secret for secret in secrets if len(secret) >= SHORTEST_SECRET)


def redact(text: str, secrets: Iterable[str]) -> str:
    """The text with its secrets replaced; longest first, since one may contain another."""
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, REDACTED)
    return text
