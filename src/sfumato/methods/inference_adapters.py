"""Adapter files and new words on a model that only generates images: nothing trains, nothing is saved."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from sfumato.config.frozen import FrozenAdapter
from sfumato.data.batch import Extras, Tensors
from sfumato.errors import UserError
from sfumato.families.base import Family
from sfumato.families.new_tokens import attach_tokens, read_embedding_widths
from sfumato.formats.embedding_file import EmbeddingFile, read_bundled_embeddings, read_embedding_file
from sfumato.methods.base_weights import read_base_weights
from sfumato.methods.calculated_weights import CalculatedWeights
from sfumato.methods.frozen_adapters import FrozenAdapters, mute_engines, read_frozen_file
from sfumato.methods.inference_lllite import attach_lllite, show_control_image
from sfumato.methods.new_words import NewWords, count_vectors, number_words, read_embedding_names

log = logging.getLogger(__name__)
Strengths = Sequence[tuple[Path, float]]


class InferenceAdapters:
    """Hooks the adapters, so that they add exactly what they added in training; those of `base` are merged before.

    embeddings: files of textual inversion, each with its word, or "" for the one that it names. Words in the adapters'
    files are used, too. lllite: files of ControlNet-LLLite. calculated: the adapters are added to the weights before
    each batch instead, which then has one strength of each.
    """

    def __init__(
        self,
        model: Family,
        files: Strengths,
        *,
        base: Strengths = (),
        embeddings: Sequence[tuple[Path, str]] = (),
        lllite: Sequence[Path] = (),
        calculated: bool = False,
    ) -> None:
        networks = {name: part.network for name, part in model.parts.items() if part.spec.targets}
        specs = {name: network.spec for name, network in networks.items()}
        groups = {name: network.groups(every=True) for name, network in networks.items()}
        merged = read_base_weights(base, specs, groups)
        merged.register(model)
        requests = [FrozenAdapter(path=path, strength=strength) for path, strength in files]
        read = [read_frozen_file(request, specs, groups, uses_words=True) for request in requests]
        for line in (*merged.notes, *(note for file in read for note in file.notes)):
            log.warning("%s", line)
        self.strengths = [file.request.strength for file in read]
        self.calculated = CalculatedWeights(read) if calculated and read else None
        self.files = [] if calculated else [FrozenAdapters([file], changes_strength=True) for file in read]
        for file in self.files:
            file.register(model)
        adapted = {part for file in read for part in file.matches}
        for part in adapted:  # not to be unloaded from now on
            model.parts[part].load()
        self.controlled = [attach_lllite(model, path) for path in lllite]
        self.live_text = frozenset(adapted & {*model.text_parts})  # the encoders with adapters, as in training

        self.words = read_words([path for path, _ in files], embeddings)
        attach_words(model, self.words)

    def rewrite_caption(self, text: str) -> str:
        return self.words.replace(text)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """A context with the model alone; words stay."""
        with mute_engines([engine for file in self.files for engine in file.engines]):
            yield

    def detach(self) -> None:
        """Remove every hook of the adapters; words stay."""
        for engine in (engine for file in self.files for engine in file.engines):
            engine.detach()
        for each in self.controlled:
            each.detach()

    def set_batch(self, model: Family, extras: Extras) -> None:
        """The strengths of the images where they have any, else those of the files."""
        show_control_image(self.controlled, model, extras)
        table = extras.multipliers
        if self.calculated is not None:
            given = self.strengths if table is None else [float(value) for value in table[0]]
            self.calculated.apply(model, tuple(extend_to(given, len(self.strengths))))
            return
        for number, (file, strength) in enumerate(zip(self.files, self.strengths, strict=True)):
            column = None if table is None else table[:, min(number, table.shape[1] - 1)].to(model.device)
            if column is None and extras.multiplier is not None:  # of a dataset, or of a slider's two sides
                column = strength * extras.multiplier.to(model.device)
            for engine in file.engines:
                engine.multiplier = strength if column is None else column

    def predict(self, model: Family, noisy: Tensor, t: Tensor, conditioning: Tensors, extras: Extras) -> Tensor:
        return model.predict(noisy, t, conditioning, extras.images)


@contextmanager
def attach_in_turn(
    model: Family, files: Strengths, *, embeddings: Sequence[tuple[Path, str]] = (), lllite: Sequence[Path] = ()
) -> Iterator[InferenceAdapters]:
    """A context with adapters; afterwards the model is what it was, ready for the next ones.

    Its weights stay in memory, but for those of text encoders that had new words.
    """
    changes = {name: list(part.changes) for name, part in model.parts.items()}
    tokenizers, controls = dict(model.tokenizers), (model.control_adapters, model.takes_control_mask)
    in_latents = set(model.controls_in_latents)
    adapters = InferenceAdapters(model, files, embeddings=embeddings, lllite=lllite)
    try:
        yield adapters
    finally:
        adapters.detach()
        for name, part in model.parts.items():
            part.changes[:] = changes[name]
            if adapters.words and name in model.text_parts:
                part.unload()
        model.tokenizers.update(tokenizers)
        model.control_adapters, model.takes_control_mask = controls
        model.controls_in_latents = in_latents


def extend_to(values: Sequence[float], count: int) -> list[float]:
    """So many values: the last one counts for the rest."""
    return [values[min(i, len(values) - 1)] for i in range(count)]


def read_words(adapters: Sequence[Path], embeddings: Sequence[tuple[Path, str]]) -> NewWords:
    """The words of all files; UserError where two have the same."""
    found: list[tuple[str, EmbeddingFile]] = []
    for path in adapters:
        found += read_bundled_embeddings(path).items()
    for path, word in embeddings:
        file = read_embedding_file(path)
        found.append((word or file.word or path.stem, file))
    files: dict[str, Path] = {}
    for word, file in found:
        if word.lower() in files:
            raise UserError(
                f"{files[word.lower()]} and {file.path} both have vectors of {word}",
                code="embedding-word-twice",
                fix=f"give one of them, or another word: --textual_inversion_embeddings {file.path}=WORD",
            )
        files[word.lower()] = file.path
    return number_words([(word, count_vectors(file, None), "", file) for word, file in found])


def attach_words(model: Family, words: NewWords) -> None:
    """Give the model's tokenizers and text encoders the words of files."""
    if not words:
        return
    names, widths = read_embedding_names(model.blueprint), read_embedding_widths(model.blueprint)
    files = [word.file for word in words if word.file is not None]
    vectors = [file.select_vectors(names, widths) for file in files]

    def make(part: str, table: Tensor) -> Tensor:
        return torch.cat([each[part] for each in vectors]).to(table.device)

    attach_tokens(model, words.letters, make, nn.ModuleDict())
