"""Captions of textual inversion that are made of the new word alone, about an object or about a style."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from sfumato.config.embedding import EmbeddingOptions

SHOTS = ("a photo", "a close-up photo", "a cropped photo", "a bright photo", "a dark photo", "a rendering")
ARTICLES = ("a", "the", "one", "my")
OBJECTS = tuple(f"{shot} of {article} {{}}" for shot, article in product(SHOTS, ARTICLES))
MOODS = ("", "bright ", "dark ", "clean ")
WORKS = ("painting", "picture", "drawing", "rendering", "print")
STYLES = tuple(f"a {mood}{work} in the style of {{}}" for mood, work in product(MOODS, WORKS))


def make_template_captions(options: EmbeddingOptions) -> tuple[str, ...]:
    """The captions of --use_object_template or --use_style_template, one of which each sample gets; else none."""
    if not options.token_string:  # they have no effect then
        return ()
    templates: Sequence[str] = OBJECTS if options.use_object_template else ()
    templates = STYLES if options.use_style_template else templates
    words = " ".join(options.token_string)
    return tuple(template.format(words) for template in templates)
