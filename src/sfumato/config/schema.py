"""The whole configuration: one attribute per theme, and the vocabulary of all options."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from pydantic import Field

from sfumato.common.names import OPTION_ALIASES
from sfumato.config.base import Option, Options
from sfumato.config.cache import CacheOptions, LoaderOptions
from sfumato.config.dataset import BucketOptions, CaptionOptions, DatasetOptions, ImageOptions
from sfumato.config.embedding import EmbeddingOptions
from sfumato.config.evaluation import SampleOptions, ValidationOptions
from sfumato.config.log import LogOptions
from sfumato.config.memory import MemoryOptions
from sfumato.config.model import ModelOptions
from sfumato.config.network import FullOptions, LecoOptions, LLLiteOptions, NetworkOptions
from sfumato.config.noise import LossOptions, NoiseOptions
from sfumato.config.optim import EmaOptions, OptimOptions
from sfumato.config.option_table import OptionTable, make_option_table
from sfumato.config.run import LoopOptions, ProcessOptions, RunOptions
from sfumato.config.save import HubOptions, MetadataOptions, SaveOptions

THEMES: dict[str, type[Options]] = {
    "run": RunOptions,
    "model": ModelOptions,
    "network": NetworkOptions,
    "full": FullOptions,
    "embedding": EmbeddingOptions,
    "lllite": LLLiteOptions,
    "leco": LecoOptions,
    "dataset": DatasetOptions,
    "buckets": BucketOptions,
    "captions": CaptionOptions,
    "images": ImageOptions,
    "cache": CacheOptions,
    "loader": LoaderOptions,
    "optim": OptimOptions,
    "ema": EmaOptions,
    "loop": LoopOptions,
    "noise": NoiseOptions,
    "loss": LossOptions,
    "memory": MemoryOptions,
    "save": SaveOptions,
    "metadata": MetadataOptions,
    "hub": HubOptions,
    "log": LogOptions,
    "samples": SampleOptions,
    "validation": ValidationOptions,
    "processes": ProcessOptions,
}


@cache
def training_table() -> OptionTable:
    """Every option of training."""
    return make_option_table(THEMES, aliases=OPTION_ALIASES)


def vocabulary() -> Mapping[str, Option]:
    """Every option of training by name, theme after theme."""
    return training_table().options


def theme_title(theme: str) -> str:
    """The heading of a theme in help texts and documents."""
    return (THEMES[theme].__doc__ or theme).strip()


class Config(Options):
    """The options of a run, one attribute per theme; frozen, each value already of its type."""

    run: RunOptions = RunOptions()
    model: ModelOptions = ModelOptions()
    network: NetworkOptions = NetworkOptions()
    full: FullOptions = FullOptions()
    embedding: EmbeddingOptions = EmbeddingOptions()
    lllite: LLLiteOptions = LLLiteOptions()
    leco: LecoOptions = LecoOptions()
    dataset: DatasetOptions = DatasetOptions()
    buckets: BucketOptions = BucketOptions()
    captions: CaptionOptions = CaptionOptions()
    images: ImageOptions = ImageOptions()
    cache: CacheOptions = CacheOptions()
    loader: LoaderOptions = LoaderOptions()
    optim: OptimOptions = OptimOptions()
    ema: EmaOptions = EmaOptions()
    loop: LoopOptions = LoopOptions()
    noise: NoiseOptions = NoiseOptions()
    loss: LossOptions = LossOptions()
    memory: MemoryOptions = MemoryOptions()
    save: SaveOptions = SaveOptions()
    metadata: MetadataOptions = MetadataOptions()
    hub: HubOptions = HubOptions()
    log: LogOptions = LogOptions()
    samples: SampleOptions = SampleOptions()
    validation: ValidationOptions = ValidationOptions()
    processes: ProcessOptions = ProcessOptions()
    # option -> "command line", a file's name, "preset", "launcher" or "default"
    sources: dict[str, str] = Field({}, repr=False)
    notes: tuple[str, ...] = ()  # lines for the report before the first step

    def value(self, name: str) -> Any:
        """The value of an option by its name."""
        return getattr(getattr(self, vocabulary()[name].theme), name)

    def is_changed(self, *names: str) -> bool:
        """Whether any of these options differs from its default."""
        return any(self.value(name) != vocabulary()[name].default for name in names)

    def with_values(self, values: Mapping[str, Any]) -> Config:
        """A copy with these values of options, by name."""
        themes: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            themes.setdefault(vocabulary()[name].theme, {})[name] = value
        changed = {theme: getattr(self, theme).model_copy(update=own) for theme, own in themes.items()}
        return self.model_copy(update=changed)

    def source(self, name: str) -> str:
        """Where the value of an option comes from."""
        return self.sources.get(name, "default")
