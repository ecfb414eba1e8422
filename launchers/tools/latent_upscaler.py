"""Writes images of twice the size by a network on their latents, from a checkout, too."""

import os, sys; sys.path.insert(0, os.path.abspath(__file__ + "/../../../src"))  # fmt: skip
from sfumato.compat.launch import launch; launch(__name__, "tools/latent_upscaler")  # fmt: skip
