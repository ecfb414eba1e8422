"""Trains an adapter for Stable Diffusion 1 and 2 from prompts; runs from a checkout without installing, too."""

import os, sys; sys.path.insert(0, os.path.abspath(__file__ + "/../../src"))  # fmt: skip
from sfumato.compat.launch import launch; launch(__name__, "train_leco")  # fmt: skip
