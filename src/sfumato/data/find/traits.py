"""What an image's header shows besides its size, as bits of a number, so that a million of them take little memory."""

from __future__ import annotations

Traits = int

PLAIN = 0
ALPHA = 1  # an alpha channel or transparent colors, whether any pixel is transparent or not
FRAMES = 2  # several frames or pages
CONVERTED = 4  # an embedded color profile that is not sRGB, so that its pixels are converted
BROKEN_PROFILE = 8  # an embedded color profile that cannot be used
UNKNOWN_PROFILE = 16  # an embedded color profile, before it is read
JXL_PLUGIN = 32  # read with Pillow's plugin for JPEG XL
HEIF_PLUGIN = 64  # read with Pillow's plugin for HEIC/HEIF
