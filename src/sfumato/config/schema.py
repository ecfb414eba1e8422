"""The whole configuration: one attribute per theme, and the vocabulary derived from it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

from pydantic import Field

from sfumato.config.base import Option, Options, described
from sfumato.config.cache import CacheOptions, LoaderOptions
from sfumato.config.captions import CaptionOptions
from sfumato.config.dataset import BucketOptions, DatasetOptions, ImageOptions
from sfumato.config.ema import EmaOptions
from sfumato.config.full import FullOptions
from sfumato.config.log import LogOptions
from sfumato.config.loop import LoopOptions
from sfumato.config.memory import MemoryOptions
from sfumato.config.model import ModelOptions
from sfumato.config.network import NetworkOptions
from sfumato.config.noise import LossOptions, NoiseOptions
from sfumato.config.optim import OptimOptions
from sfumato.config.processes import ProcessOptions
from sfumato.config.run import RunOptions
from sfumato.config.samples import SampleOptions
from sfumato.config.save import HubOptions, MetadataOptions, SaveOptions
from sfumato.config.validation import ValidationOptions

THEMES: dict[str, type[Options]] = {
    "run": RunOptions,
    "model": ModelOptions,
    "network": NetworkOptions,
    "full": FullOptions,
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
def vocabulary() -> dict[str, Option]:
    """Every option by name, theme after theme in the order of their fields."""
    found: dict[str, Option] = {}
    for theme, options in THEMES.items():
        for name, info in options.model_fields.items():
            assert name not in found, f"two themes have the option {name}"
            found[name] = described(name, theme, info)
    return found


def by_theme(options: Iterable[Option]) -> dict[str, list[Option]]:
    """Options in groups, in the order of the themes; empty groups are left out."""
    groups: dict[str, list[Option]] = {theme: [] for theme in THEMES}
    for each in options:
        groups[each.theme].append(each)
    return {theme: group for theme, group in groups.items() if group}


def title(theme: str) -> str:
    return (THEMES[theme].__doc__ or theme).strip()


class Config(Options):
    """Everything that a run was asked for; frozen, each value already of its right type."""

    run: RunOptions = RunOptions()
    model: ModelOptions = ModelOptions()
    network: NetworkOptions = NetworkOptions()
    full: FullOptions = FullOptions()
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
    sources: dict[str, str] = Field({}, repr=False)  # option -> "command line", a file's name, "launcher" or "default"
    notes: tuple[str, ...] = ()  # lines for the report before the first step

    def value(self, name: str) -> Any:
        """The value of an option by its name."""
        return getattr(getattr(self, vocabulary()[name].theme), name)

    def changed(self, *names: str) -> bool:
        """Whether any of these options differs from its default."""
        return any(self.value(name) != vocabulary()[name].default for name in names)

    def source(self, name: str) -> str:
        """Where the value of an option came from."""
        return self.sources.get(name, "default")
