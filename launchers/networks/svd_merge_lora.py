"""Merges LoRA files of any ranks into one of a given rank; runs from a checkout without installing, too."""

import os, sys; sys.path.insert(0, os.path.abspath(__file__ + "/../../../src"))  # fmt: skip
from sfumato.compat.launch import launch; launch(__name__, "networks/svd_merge_lora")  # fmt: skip
