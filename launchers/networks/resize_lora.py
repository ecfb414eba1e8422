"""Writes a LoRA at a smaller rank; runs from a checkout, too."""

import os, sys; sys.path.insert(0, os.path.abspath(__file__ + "/../../../src"))  # fmt: skip
from sfumato.compat.launch import launch; launch(__name__, "networks/resize_lora")  # fmt: skip
