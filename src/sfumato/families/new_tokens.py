"""New tokens of text encoders: letters in captions that tokenizers know, and vectors beside the tables of the encoders.

A letter of Unicode's private use area stands for one vector in a caption, so that no tokenizer can divide it and no
caption has it by chance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.families._gemma2_tokenizer import GemmaTokenizer
from sfumato.families.base import Family
from sfumato.families.blueprint import Blueprint
from sfumato.families.part import Part, WeightChange

FIRST_LETTER = 0xF0000


def make_letters(start: int, count: int) -> str:
    """The letters of so many vectors, after the first `start` ones."""
    return "".join(chr(FIRST_LETTER + start + i) for i in range(count))


def add_letters(tokenizer: Any, letters: str) -> tuple[Any, int]:
    """The tokenizer with a token for each letter, and the id of the first; a space before a letter belongs to it."""
    if isinstance(tokenizer, GemmaTokenizer):
        return tokenizer.with_letters(letters), tokenizer.size
    from transformers import AddedToken

    tokenizer.add_tokens([AddedToken(letter, lstrip=True, normalized=False) for letter in letters])
    first = tokenizer.convert_tokens_to_ids(letters[0])
    assert tokenizer.convert_tokens_to_ids(list(letters)) == [first + i for i in range(len(letters))]
    return tokenizer, first


def find_token_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text's tokens inside a caption, after a space, without those that begin and end the caption."""
    if isinstance(tokenizer, GemmaTokenizer):
        return [token for token, _ in tokenizer.tokenize(f" {text}")]
    return tokenizer(f" {text}", add_special_tokens=False).input_ids


def list_tokens(tokenizer: Any) -> dict[int, str]:
    """Id -> text of every token, as the tokenizer has it. UserError for Gemma's, which cannot list them."""
    if isinstance(tokenizer, GemmaTokenizer):
        raise UserError(
            "the tokens of a Gemma tokenizer cannot be listed",
            code="tokens-not-listed",
            fix="give an adapter of CLIP or T5",
        )
    return {number: text for text, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])}


def is_known_token(tokenizer: Any, word: str) -> bool:
    """Whether a word is one token already."""
    ids = find_token_ids(tokenizer, word)
    return len(ids) == 1 and (isinstance(tokenizer, GemmaTokenizer) or ids[0] != tokenizer.unk_token_id)


def read_embedding_widths(blueprint: Blueprint) -> dict[str, int]:
    """Text encoder -> numbers in the vector of a token, from the headers."""
    widths: dict[str, int] = {}
    for part in blueprint.text_parts:
        weights, name = blueprint.networks[part].weights, f"{blueprint.networks[part].spec.token_table}.weight"
        widths[part] = weights.read_shapes()[weights.tied.get(name, name)][1]
    return widths


def attach_tokens(model: Family, letters: str, make: Callable[[str, Tensor], Tensor], modules: nn.ModuleDict) -> None:
    """Give every text encoder new tokens; their vectors are in `modules` once the encoder has been loaded.

    make: text encoder and its table (tokens, width) -> the vectors (len(letters), width) that they start from.
    The features of such an encoder are never cached.
    """
    for part in model.text_parts:
        model.tokenizers[part], first = add_letters(model.tokenizers[part], letters)

        def attach(network: nn.Module, part: str = part, first: int = first) -> None:
            table = find_token_table(model.parts[part], network)
            if part not in modules:
                modules[part] = NewVectors(make(part, table.weight.detach()), first)
            vectors = modules[part]
            assert isinstance(vectors, NewVectors)
            vectors.attach(table)

        model.parts[part].add_change(WeightChange(identity="", apply=attach))


def find_token_table(part: Part, network: nn.Module) -> nn.Embedding:
    """The module of a text encoder that looks up the vectors of tokens."""
    table = network.get_submodule(part.spec.token_table)
    assert isinstance(table, nn.Embedding)
    return table


class NewVectors(nn.Module):
    """The vectors of new tokens of one text encoder; its own table stays as it is, and frozen.

    vectors: (count, width), float32 while they are trained. first: the id of the first token.
    """

    initial: Tensor

    def __init__(self, vectors: Tensor, first: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(vectors, requires_grad=False)
        self.register_buffer("initial", vectors.clone(), persistent=False)
        self.first = first
        self.uses_initial = False  # instead of what was trained
        self._ids: Tensor | None = None  # of the call in progress
        self._is_inside = False  # whether the table is called for the new tokens

    def attach(self, table: nn.Embedding) -> None:
        """Hook a table, which from then on knows the new ids."""
        table.register_forward_pre_hook(self._hide_new)
        table.register_forward_hook(self._insert_new)

    def _hide_new(self, table: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._is_inside:
            return None
        ids: Tensor = args[0]
        self._ids = ids
        return (ids.where(ids < self.first, 0), *args[1:])

    def _insert_new(self, table: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Whatever else a table does with a vector, e.g. scale it, it does with the new ones."""
        ids = self._ids
        if self._is_inside or ids is None:
            return None
        assert isinstance(table, nn.Embedding)
        vectors = self.initial if self.uses_initial else self.vectors
        padding, table.padding_idx = table.padding_idx, None  # the row of this number would get no gradient
        self._is_inside = True
        try:
            places = (ids - self.first).clamp(min=0)
            new = torch.func.functional_call(table, {"weight": vectors}, (places,))
        finally:
            self._is_inside, table.padding_idx = False, padding
        return torch.where((ids >= self.first)[..., None], new.to(output.dtype), output)
