"""Training images on a page: a small copy of each, and what is said of it. Every text from outside is escaped here."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import PurePath

from PIL import Image

from sfumato.data.images import decode_image
from sfumato.errors import UserError

THUMBNAIL_SIDE, JPEG_QUALITY = 160, 78  # pixels of the longer side
MAX_CAPTION = 300  # characters


@dataclass(frozen=True, kw_only=True)
class ImageCard:
    """One image. tag: of `make_image_tag`."""

    tag: str
    path: str
    value: str = ""  # in bold
    facts: str = ""
    caption: str | None = None  # None: not shown


def render_cards(cards: Sequence[ImageCard]) -> str:
    return f'<ol class="images">{"".join(map(render_card, cards))}</ol>'


def render_card(card: ImageCard) -> str:
    value = f"<b>{escape(card.value)}</b> " if card.value else ""
    caption = ""
    if card.caption is not None:
        shown = escape(card.caption[:MAX_CAPTION]) or "<em>empty caption</em>"
        caption = f'<p title="{escape(card.caption)}">{shown}</p>'
    name = escape(PurePath(card.path).name)
    return f"<li>{card.tag}{value}<small>{escape(card.facts)}</small><span>{name}</span>{caption}</li>"


def make_image_tag(read: Callable[[], bytes], path: str) -> str:
    """An <img> with a small copy of the image as a data URL; a note where it cannot be read."""
    try:
        small = decode_image(read(), path)
    except (OSError, UserError):
        return "<em>cannot be read</em>"
    return embed_thumbnail(small, path)


def embed_thumbnail(image: Image.Image, path: str) -> str:
    small = image.copy()
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX)
    content = io.BytesIO()
    small.save(content, "JPEG", quality=JPEG_QUALITY)
    uri = "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()
    name = escape(PurePath(path).name)
    return f'<img src="{uri}" width="{small.width}" height="{small.height}" alt="{name}" loading="lazy">'
