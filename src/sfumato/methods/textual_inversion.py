"""Textual inversion (Gal et al. 2022): only the vectors of new words are trained, the whole model is frozen."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.config import Config
from sfumato.data.batch import Extras, Tensors
from sfumato.families.base import Family
from sfumato.families.blueprint import Blueprint
from sfumato.formats.embedding_file import write_embedding_folder
from sfumato.formats.hashed_file import write_hashed_file
from sfumato.formats.pickled import get_file_suffix
from sfumato.methods.base import METHODS, PlanNotes, TrainablePart
from sfumato.methods.trained_embeddings import TrainedEmbeddings
from sfumato.methods.trained_parts import make_zero_learning_rates_error
from sfumato.optim.groups import ParameterGroup


@METHODS.register("textual_inversion")
class TextualInversionMethod:
    """One word is saved as a file, several as a folder with a file for each."""

    modelspec_suffix = "/textual-inversion"

    def __init__(self, config: Config) -> None:
        self.config = config
        self.embeddings = TrainedEmbeddings(config)
        self.modules = nn.ModuleDict({"embeddings": self.embeddings.modules})
        self.live_text: frozenset[str] = frozenset()

    def extend(self, family: type[Family], blueprint: Blueprint) -> Blueprint:
        return blueprint

    def plan(self, blueprint: Blueprint) -> list[TrainablePart]:
        parts = self.embeddings.plan(blueprint)
        self.live_text = self.embeddings.live_text
        if not self.embeddings.learning_rate:
            raise make_zero_learning_rates_error("--learning_rate 5e-3")
        return parts

    def list_notes(self, blueprint: Blueprint) -> PlanNotes:
        return PlanNotes()

    def full_precision_parts(self, blueprint: Blueprint) -> Collection[str]:
        return ()

    def change_frozen(self, model: Family) -> None:
        self.embeddings.register(model)

    def prepare(self, model: Family) -> list[ParameterGroup]:
        return self.embeddings.prepare()

    def rewrite_caption(self, text: str) -> str:
        return self.embeddings.words.replace(text)

    def before_step(self, step: int) -> None:
        pass

    def set_batch(self, model: Family, extras: Extras) -> None:
        pass

    def predict(self, model: Family, noisy: Tensor, t: Tensor, conditioning: Tensors, extras: Extras) -> Tensor:
        return model.predict(noisy, t, conditioning, extras.images)

    def disabled(self) -> AbstractContextManager[None]:
        return self.embeddings.use_initial()

    def sampling(self) -> AbstractContextManager[None]:
        return nullcontext()

    def list_frozen(self) -> Sequence[nn.Module]:
        return ()

    def list_generate_options(self, file: str, blueprint: Blueprint) -> Mapping[str, object]:
        if not file:
            return {}
        words = [word.text for word in self.embeddings.words]
        named = [f"{file}={words[0]}"] if len(words) == 1 else [file]
        return {"textual_inversion_embeddings": named}

    def after_step(self) -> Mapping[str, Tensor]:
        return {}

    def state_dict(self) -> Tensors:
        return self.embeddings.export_state()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.embeddings.load_state(state)

    def metadata(self) -> Mapping[str, Any]:
        return self.embeddings.metadata()

    def output_bytes(self, blueprint: Blueprint, dtype: torch.dtype | None) -> int:
        numbers = sum(part.parameters for part in self.embeddings.plan(blueprint))
        return numbers * (dtype or torch.float32).itemsize

    def file_suffixes(self, blueprint: Blueprint) -> Sequence[str]:
        return ("" if self.saves_folder else get_file_suffix(self.config.save.save_model_as),)

    def write(self, model: Family, path: Path, metadata: Mapping[str, str], dtype: torch.dtype | None) -> None:
        words = self.embeddings.export_vectors()
        if self.saves_folder:
            write_embedding_folder(path, words, metadata, dtype, get_file_suffix(self.config.save.save_model_as))
        else:
            (vectors,) = words.values()
            write_hashed_file(path, vectors, metadata, dtype)

    def report(self) -> list[str]:
        return []

    @property
    def saves_folder(self) -> bool:
        """Whether there are several words; other programs know a word by its file's name."""
        return len(self.config.embedding.token_string) > 1
