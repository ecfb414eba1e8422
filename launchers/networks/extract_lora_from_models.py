"""Makes a LoRA of the difference of two checkpoints of Stable Diffusion; runs from a checkout, too."""

import os, sys; sys.path.insert(0, os.path.abspath(__file__ + "/../../../src"))  # fmt: skip
from sfumato.compat.launch import launch; launch(__name__, "networks/extract_lora_from_models")  # fmt: skip
