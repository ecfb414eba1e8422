"""The demo's judge of likeness: what its classifier sees in an image before it names a class, as one vector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from sfumato.demo.classifier import Classifier, load_classifier, to_pixels


class ClassifierEncoder:
    """Images as the shipped classifier sees them, an image encoder for `sfumato compare`."""

    name = "the demo's classifier"

    def __init__(self, classifier: Classifier | None = None) -> None:
        network = (classifier or load_classifier()).network
        assert isinstance(network, nn.Sequential)
        self.layers = network[:-1]

    @torch.no_grad()
    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        """(N, D) float32, each row of length 1: the features that the last layer reads."""
        return F.normalize(self.layers(to_pixels(images)), dim=1)
