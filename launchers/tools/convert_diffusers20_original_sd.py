"""Converts Stable Diffusion between a checkpoint and a folder of diffusers; runs from a checkout, too."""

import os, sys; sys.path.insert(0, os.path.abspath(__file__ + "/../../../src"))  # fmt: skip
from sfumato.compat.launch import launch; launch(__name__, "tools/convert_diffusers20_original_sd")  # fmt: skip
