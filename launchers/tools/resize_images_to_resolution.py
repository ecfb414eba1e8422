"""Writes smaller copies of images, from a checkout, too."""

import os, sys; sys.path.insert(0, os.path.abspath(__file__ + "/../../../src"))  # fmt: skip
from sfumato.compat.launch import launch; launch(__name__, "tools/resize_images_to_resolution")  # fmt: skip
