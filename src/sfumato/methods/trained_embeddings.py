"""The vectors of new words, trained: alone (textual inversion) or beside an adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.common.seeds import seed_of
from sfumato.config import Config
from sfumato.families.base import Family
from sfumato.families.blueprint import Blueprint
from sfumato.families.new_tokens import NewVectors, attach_tokens, find_token_ids, read_embedding_widths
from sfumato.formats.embedding_file import WORD_KEY, bundle_vectors
from sfumato.methods.base import TrainablePart
from sfumato.methods.new_words import NewWord, NewWords, read_embedding_names, read_new_words
from sfumato.methods.trained_parts import check_text_cache
from sfumato.optim.groups import ParameterGroup

SAMPLED_TOKENS = 1000  # whose mean and spread random vectors have


class TrainedEmbeddings:
    """One table of vectors for each text encoder, whose rows are the words' vectors in order; none without words."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.words = NewWords()
        self.modules = nn.ModuleDict()  # text encoder -> NewVectors, once it is loaded
        self.names: dict[str, str] = {}  # text encoder -> its name in files
        own = config.embedding.embedding_lr
        self.learning_rate = config.optim.learning_rate if own is None else own

    def plan(self, blueprint: Blueprint) -> list[TrainablePart]:
        """What trains, from the checkpoint's headers. UserError for a file of another model."""
        self.words = read_new_words(self.config)
        if not self.words:
            return []
        self.names = read_embedding_names(blueprint)
        check_text_cache(self.config, self.names, blueprint, "remove --cache_text_encoder_outputs")
        widths = read_embedding_widths(blueprint)
        self._start_vectors(widths)
        count = len(self.words.letters)
        return [
            TrainablePart(part=make_label(part), modules=1, parameters=count * width, learning_rate=self.learning_rate)
            for part, width in widths.items()
        ]

    @property
    def live_text(self) -> frozenset[str]:
        """The text encoders whose output changes while the vectors train."""
        return frozenset(self.names)

    def register(self, model: Family) -> None:
        """Give the model's tokenizers and text encoders the words; their vectors are made when these are loaded."""
        if not self.words:
            return
        files = self._start_vectors(read_embedding_widths(model.blueprint))

        def make(part: str, table: Tensor) -> Tensor:
            rows: list[Tensor] = []
            for word in self.words:
                rows.append(files[word.text][part] if word.text in files else self._start(model, part, word, table))
            return torch.cat([each.to(table.device, torch.float32) for each in rows])

        attach_tokens(model, self.words.letters, make, self.modules)

    def prepare(self) -> list[ParameterGroup]:
        """Make the vectors trainable; the encoders are loaded."""
        groups: list[ParameterGroup] = []
        for part, vectors in self._tables():
            vectors.requires_grad_(True)
            groups.append(
                ParameterGroup(name=make_label(part), parameters=[vectors.vectors], learning_rate=self.learning_rate)
            )
        return groups

    @contextmanager
    def use_initial(self) -> Iterator[None]:
        """A context in which the words have the vectors that they started from."""
        for _, vectors in self._tables():
            vectors.uses_initial = True
        try:
            yield
        finally:
            for _, vectors in self._tables():
                vectors.uses_initial = False

    def export_vectors(self) -> dict[str, dict[str, Tensor]]:
        """Word -> name in files -> its vectors."""
        exported: dict[str, dict[str, Tensor]] = {}
        start = 0
        for word in self.words:
            rows = slice(start, start + word.vectors)
            exported[word.text] = {self.names[part]: table.vectors.detach()[rows] for part, table in self._tables()}
            start += word.vectors
        return exported

    def export_state(self) -> dict[str, Tensor]:
        """For a saved state: text encoder and word -> its vectors."""
        return {
            f"embeddings.{name}.{word}": vectors
            for word, by_name in self.export_vectors().items()
            for name, vectors in by_name.items()
        }

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over the vectors of a saved state of the same words."""
        for name, vectors in self.export_state().items():
            vectors.copy_(state[name])

    def export_bundle(self) -> dict[str, Tensor]:
        """All vectors, as a file with adapters holds them."""
        bundle: dict[str, Tensor] = {}
        for word, vectors in self.export_vectors().items():
            bundle |= bundle_vectors(word, vectors)
        return bundle

    def metadata(self) -> Mapping[str, Any]:
        """The ss_ keys of files with words."""
        if not self.words:
            return {}
        given = {"ss_init_word": [word.init for word in self.words if word.init]}
        given["ss_num_vectors_per_token"] = [str(word.vectors) for word in self.words]
        return {WORD_KEY: " ".join(word.text for word in self.words)} | {
            name: ", ".join(texts) for name, texts in given.items() if texts
        }

    def _tables(self) -> Iterator[tuple[str, NewVectors]]:
        for part, module in self.modules.items():
            assert isinstance(module, NewVectors)
            yield part, module

    def _start_vectors(self, widths: Mapping[str, int]) -> dict[str, dict[str, Tensor]]:
        """Word -> text encoder -> the vectors of its file, for those that have one."""
        return {word.text: word.file.select_vectors(self.names, widths) for word in self.words if word.file is not None}

    def _start(self, model: Family, part: str, word: NewWord, table: Tensor) -> Tensor:
        """(vectors, width) from the initial text, repeated or cut, else random ones that are spread like a table's."""
        if word.init:
            ids = find_token_ids(model.tokenizers[part], word.init)
            places = torch.tensor([ids[i % len(ids)] for i in range(word.vectors)])
            return table.index_select(0, places.to(table.device))
        seed = seed_of(self.config.loop.seed or 0, f"vectors of {word.text} for {part}")
        noise = torch.randn((word.vectors, table.shape[1]), generator=torch.Generator().manual_seed(seed))
        some = table[:: max(1, len(table) // SAMPLED_TOKENS)].float()
        return some.mean(0) + some.std(0) * noise.to(table.device)


def make_label(part: str) -> str:
    """The name of a text encoder's new vectors in logs and reports."""
    return f"{part}.embeddings"
