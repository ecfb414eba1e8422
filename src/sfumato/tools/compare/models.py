"""The model with each checkpoint of a run: the base model is loaded once, and adapters are attached to it in turn."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from sfumato.config import Config
from sfumato.config.schema import vocabulary
from sfumato.data.buckets import Size
from sfumato.families.base import Family
from sfumato.families.blueprint import Blueprint
from sfumato.families.detection import describe_model
from sfumato.methods import make_method
from sfumato.methods.inference_adapters import InferenceAdapters, attach_in_turn
from sfumato.tools.generate_setup import GenerateRequest, load_requested_model, make_adapters

log = logging.getLogger(__name__)
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")  # folders, in the order of the text encoders


class CheckpointModels:
    """Gives the model before training, and with what a checkpoint holds.

    A checkpoint of whole networks is opened like any other model, in the place of the base model.
    """

    def __init__(self, config: Config, resolutions: Sequence[Size] = ()) -> None:
        """resolutions: that were trained."""
        self.config, self.resolutions = config, resolutions
        self.method = make_method(config)
        self._base: Family | None = None

    @property
    def base(self) -> Family:
        """The base model, with what is merged into it; no weight is read before it is needed."""
        if self._base is None:
            self._base = self._load(self.config)
        return self._base

    def is_base(self, model: Family) -> bool:
        """Whether a model is the base model, to which adapters are attached in turn."""
        return model is self._base

    def list_options(self, checkpoint: Path | None) -> Mapping[str, object]:
        """The options of `sfumato generate` for a checkpoint; None is the model before training."""
        options = self.method.list_generate_options(str(checkpoint) if checkpoint else "", self._blueprint)
        return {**self._find_tokenizers(), **options} if list_model_options(options) else options

    @contextmanager
    def use(self, checkpoint: Path | None) -> Iterator[tuple[Family, InferenceAdapters]]:
        """The model with a checkpoint, and what predicts with it."""
        options = self.list_options(checkpoint)
        whole = list_model_options(options)
        if whole:
            self._base = None  # there is room for one model
            model = self._load(self.config.with_values(whole))
        else:
            model = self.base
        with attach_in_turn(
            model,
            read_networks(options),
            embeddings=read_words_of(options),
            lllite=read_paths(options, "control_net_lllite_models"),
        ) as adapters:
            yield model, adapters

    def _load(self, config: Config) -> Family:
        trained = self._list_float32_parts(config)
        request = GenerateRequest(config=config, networks=(), outdir=Path(), float32_parts=trained)
        model = load_requested_model(request)
        make_adapters(request, model)  # what is merged
        model.set_resolutions(self.resolutions)
        return model

    def _find_tokenizers(self) -> dict[str, object]:
        """Those beside the base model, which a checkpoint in another folder has not beside it."""
        base = self.config.model.pretrained_model_name_or_path
        if self.config.model.tokenizer or base is None:
            return {}
        folder = Path(base) if Path(base).is_dir() else Path(base).parent
        found = tuple(str(path) for path in (folder / name for name in TOKENIZERS) if path.is_dir())
        return {"tokenizer": found} if len(found) == len(self._blueprint.text_parts) else {}

    @cached_property
    def _blueprint(self) -> Blueprint:
        """Of the base model."""
        return describe_model(self.config)[1]

    def _list_float32_parts(self, config: Config) -> tuple[str, ...]:
        """The networks that train as a whole keep the precision that they are trained in."""
        if config.memory.trained_precision != "no":
            return ()
        _, blueprint = describe_model(config)
        parts = self.method.full_precision_parts(blueprint)
        return tuple(part for part in parts if part in blueprint.networks or config is not self.config)


def list_model_options(options: Mapping[str, object]) -> dict[str, object]:
    """Those of them that name the model itself, not what is attached to it."""
    return {name: value for name, value in options.items() if name in vocabulary() and name != "network_weights"}


def read_paths(options: Mapping[str, object], name: str) -> list[Path]:
    value = options.get(name, ())
    assert isinstance(value, list | tuple)
    return [Path(str(path)) for path in value]


def read_networks(options: Mapping[str, object]) -> list[tuple[Path, float]]:
    """Adapter files with their multipliers."""
    paths = read_paths(options, "network_weights")
    multipliers = options.get("network_mul", [1.0] * len(paths))
    assert isinstance(multipliers, list | tuple)
    return [(path, float(multiplier)) for path, multiplier in zip(paths, multipliers, strict=True)]


def read_words_of(options: Mapping[str, object]) -> list[tuple[Path, str]]:
    """Files of textual inversion, each with its word or ""."""
    found: list[tuple[Path, str]] = []
    for path in read_paths(options, "textual_inversion_embeddings"):
        name, _, word = str(path).rpartition("=") if not path.exists() else (str(path), "", "")
        found.append((Path(name), word))
    return found
