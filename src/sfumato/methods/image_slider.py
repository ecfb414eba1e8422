"""Sliders from pairs of images: an adapter that has learned more of an attribute at strength 1, and less at -1."""

from __future__ import annotations

from sfumato.methods.adapter import AdapterMethod
from sfumato.methods.base import METHODS


@METHODS.register("image_slider")
class ImageSliderMethod(AdapterMethod):
    """What it trains towards is in training/pair_loss.py; the adapter and its file are those of any other run."""
