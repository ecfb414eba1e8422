"""Merges LoRA files into FLUX.1's transformer and its text encoders, or into one LoRA, from a checkout, too."""

import os, sys; sys.path.insert(0, os.path.abspath(__file__ + "/../../../src"))  # fmt: skip
from sfumato.compat.launch import launch; launch(__name__, "networks/flux_merge_lora")  # fmt: skip
