"""Which tokens an adapter of a text encoder changes most: every token is encoded alone, without it and with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.common.text import plural
from sfumato.config import ModelOptions, NoiseOptions
from sfumato.config.frozen import FrozenAdapter
from sfumato.errors import UserError
from sfumato.families import register_families
from sfumato.families.base import Family, find_family
from sfumato.families.new_tokens import list_tokens
from sfumato.families.source import open_source
from sfumato.methods.frozen_adapters import FrozenAdapters, read_frozen_file
from sfumato.track.progress_task import ProgressTask


@dataclass(frozen=True, kw_only=True)
class TokensRequest:
    """Which adapter to look at, on which model."""

    adapter: Path
    model: ModelOptions
    top: int = 100
    batch_size: int = 256
    layer: int | None = None  # from the end, whose output is compared; None: the last with its norm
    family: str | None = None


@torch.no_grad()
def rank_tokens(request: TokensRequest) -> list[str]:
    """The lines of the report: for each text encoder that the adapter changes its tokens, the most changed first.

    Only these encoders are read. UserError for an adapter of the denoiser alone.
    """
    model = open_frozen_model(request)
    adapters = attach_to_encoders(model, request.adapter)
    lines: list[str] = []
    for part in model.text_parts:
        if any(part in file.matches for file in adapters.files):
            tokens = list_tokens(model.tokenizers[part])
            changes = measure_tokens(model, part, adapters, list(tokens), request)
            lines += ["", f"{part}: {plural(len(tokens), 'token')}, mean change {float(changes.mean()):.4g}"]
            lines += format_tokens(tokens, changes, request.top)
            model.parts[part].unload()
    return [f"{request.adapter} on {model.blueprint.source.name}", *lines]


def open_frozen_model(request: TokensRequest) -> Family:
    """The model, of which no weight is read yet."""
    register_families()
    source = open_source(request.model)
    family = find_family(request.family, source)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return family(family.read(source, request.model, NoiseOptions()), request.model, dtype=torch.float32, device=device)


def attach_to_encoders(model: Family, path: Path) -> FrozenAdapters:
    """The adapters of text encoders in a file, hooked when the encoders are loaded."""
    networks = {name: part.network for name, part in model.parts.items() if part.spec.targets}
    specs = {name: network.spec for name, network in networks.items()}
    groups = {name: network.groups(every=True) for name, network in networks.items()}
    file = read_frozen_file(FrozenAdapter(path=path, strength=1.0), specs, groups, uses_words=True)
    own = {part: found for part, found in file.matches.items() if part in model.text_parts}
    if not own:
        raise UserError(
            f"{path} changes no text encoder, but {', '.join(file.matches)}",
            code="tokens-without-text-encoder",
            fix="give an adapter that was trained with its text encoder",
        )
    adapters = FrozenAdapters([replace(file, matches=own)])
    adapters.register(model)
    return adapters


def measure_tokens(
    model: Family, part: str, adapters: FrozenAdapters, ids: Sequence[int], request: TokensRequest
) -> Tensor:
    """The mean absolute change of each token's output."""
    model.parts[part].load()
    encoder, device = model.parts[part].module, model.parts[part].device
    engines, found = adapters.engines, list[Tensor]()
    with ProgressTask(f"tokens of {part}", "tokens") as progress:
        for batch in torch.tensor(ids).split(request.batch_size):
            rows = frame_tokens(model.tokenizers[part], batch).to(device)
            outputs: list[Tensor] = []
            for strength in (0.0, 1.0):
                for engine in engines:
                    engine.multiplier = strength
                outputs.append(encode_rows(encoder, rows, request.layer))
            found.append((outputs[1] - outputs[0]).abs().mean(-1).cpu())
            progress(sum(map(len, found)), len(ids))
    return torch.cat(found)


def frame_tokens(tokenizer: Any, ids: Tensor) -> Tensor:
    """(B,) -> (B, 2 or 3): each token as a text of its own, between what begins and ends a text."""
    ends = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    begin, end = ([] if each is None else [torch.full_like(ids, each)] for each in ends)
    return torch.stack([*begin, ids, *end], dim=1)


def encode_rows(encoder: nn.Module, rows: Tensor, layer: int | None) -> Tensor:
    """(B, L) ids of texts whose last but one is the token -> its output (B, D)."""
    output = encoder(input_ids=rows, output_hidden_states=layer is not None)
    if layer is not None and layer > len(output.hidden_states):
        raise UserError(
            f"--clip_skip {layer} is more than the layers of this text encoder",
            code="tokens-layer-missing",
            fix=f"--clip_skip {len(output.hidden_states)} at most",
        )
    hidden = output.last_hidden_state if layer is None else output.hidden_states[-layer]
    return hidden[:, -2].float()


def format_tokens(tokens: dict[int, str], changes: Tensor, top: int) -> Iterator[str]:
    numbers = list(tokens)
    for place, i in enumerate(changes.argsort(descending=True, stable=True)[:top].tolist(), 1):
        yield f"  {place:>4}  {float(changes[i]):>10.4g}  {numbers[i]:>6}  {tokens[numbers[i]]}"
