"""The vocabulary: one frozen model per theme, whose field names are the option names."""

from sfumato.config.base import Options
from sfumato.config.cache import CacheOptions, LoaderOptions
from sfumato.config.captions import CaptionOptions
from sfumato.config.dataset import BucketOptions, DatasetOptions, ImageOptions
from sfumato.config.ema import EmaOptions
from sfumato.config.full import FullOptions
from sfumato.config.load import load_config
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
from sfumato.config.schema import Config
from sfumato.config.validation import ValidationOptions

__all__ = [
    "BucketOptions",
    "CacheOptions",
    "CaptionOptions",
    "Config",
    "DatasetOptions",
    "EmaOptions",
    "FullOptions",
    "HubOptions",
    "ImageOptions",
    "LoaderOptions",
    "LogOptions",
    "LoopOptions",
    "LossOptions",
    "MemoryOptions",
    "MetadataOptions",
    "ModelOptions",
    "NetworkOptions",
    "NoiseOptions",
    "OptimOptions",
    "Options",
    "ProcessOptions",
    "RunOptions",
    "SampleOptions",
    "SaveOptions",
    "ValidationOptions",
    "load_config",
]
