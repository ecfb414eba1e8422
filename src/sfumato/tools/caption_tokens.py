"""How `sfumato dataset inspect` counts the tokens of captions: the tokenizers of the options, and their limits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sfumato.config import Config
from sfumato.data.find.inspect import CountTokens
from sfumato.errors import UserError
from sfumato.families._tokenizers import load_clip_tokenizer, load_t5_tokenizer

CLIP_LIMIT, T5_LIMIT = 75, 512  # tokens, CLIP's without begin and end


def load_tokenizers(config: Config) -> dict[str, tuple[CountTokens, int]]:
    """Name -> token counter and token limit, of --tokenizer, else of the model's folder, else of CLIP."""
    folders = [Path(folder) for folder in config.model.tokenizer or ()]
    model = Path(config.model.pretrained_model_name_or_path or "")
    if not folders and config.model.pretrained_model_name_or_path and model.is_dir():
        folders = sorted(path for path in model.glob("tokenizer*") if path.is_dir())
    clip_limit = config.model.max_token_length or CLIP_LIMIT
    if not folders:
        return {"CLIP": (make_token_counter(load_clip_tokenizer()), clip_limit)}
    tokenizers = {}
    for folder in folders:
        try:
            tokenizers[folder.name] = (make_token_counter(load_clip_tokenizer(folder)), clip_limit)
        except UserError:
            limit = config.model.t5xxl_max_token_length or T5_LIMIT
            tokenizers[folder.name] = (make_token_counter(load_t5_tokenizer(folder)), limit - 1)  # one is the end token
    return tokenizers


def make_token_counter(tokenizer: Any) -> CountTokens:
    def count(captions: Sequence[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(list(captions), add_special_tokens=False, verbose=False).input_ids]

    return count
