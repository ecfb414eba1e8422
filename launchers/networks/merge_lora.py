"""Merges LoRA files into a checkpoint of Stable Diffusion 1 or 2, or into one LoRA, from a checkout, too."""

import os, sys; sys.path.insert(0, os.path.abspath(__file__ + "/../../../src"))  # fmt: skip
from sfumato.compat.launch import launch; launch(__name__, "networks/merge_lora")  # fmt: skip
