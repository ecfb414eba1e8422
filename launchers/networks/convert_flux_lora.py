"""Converts a LoRA of FLUX.1 between the names of AI-toolkit and of sd-scripts; runs from a checkout, too."""

import os, sys; sys.path.insert(0, os.path.abspath(__file__ + "/../../../src"))  # fmt: skip
from sfumato.compat.launch import launch; launch(__name__, "networks/convert_flux_lora")  # fmt: skip
