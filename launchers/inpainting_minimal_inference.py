"""Paints within a mask of an image; runs from a checkout without installing, too."""

import os, sys; sys.path.insert(0, os.path.abspath(__file__ + "/../../src"))  # fmt: skip
from sfumato.compat.launch import launch; launch(__name__, "inpainting_minimal_inference")  # fmt: skip
