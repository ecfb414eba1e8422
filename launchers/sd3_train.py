"""Trains the whole transformer of Stable Diffusion 3 and 3.5; runs from a checkout without installing, too."""

import os, sys; sys.path.insert(0, os.path.abspath(__file__ + "/../../src"))  # fmt: skip
from sfumato.compat.launch import launch; launch(__name__, "sd3_train")  # fmt: skip
