"""The vocabulary: one frozen model per theme, whose field names are the option names."""

from sfumato.config.base import Options
from sfumato.config.cache import CacheOptions, LoaderOptions
from sfumato.config.dataset import BucketOptions, CaptionOptions, DatasetOptions, ImageOptions
from sfumato.config.embedding import EmbeddingOptions
from sfumato.config.evaluation import SampleOptions, ValidationOptions
from sfumato.config.load import load_config
from sfumato.config.log import LogOptions
from sfumato.config.memory import MemoryOptions
from sfumato.config.model import ModelOptions
from sfumato.config.network import FullOptions, LecoOptions, NetworkOptions
from sfumato.config.noise import LossOptions, NoiseOptions
from sfumato.config.optim import EmaOptions, OptimOptions
from sfumato.config.run import LoopOptions, ProcessOptions, RunOptions
from sfumato.config.save import HubOptions, MetadataOptions, SaveOptions
from sfumato.config.schema import Config

__all__ = [
    "BucketOptions",
    "CacheOptions",
    "CaptionOptions",
    "Config",
    "DatasetOptions",
    "EmaOptions",
    "EmbeddingOptions",
    "FullOptions",
    "HubOptions",
    "ImageOptions",
    "LecoOptions",
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
