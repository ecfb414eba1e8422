"""Shows which tokens a LoRA of a text encoder changes most; runs from a checkout, too."""

import os, sys; sys.path.insert(0, os.path.abspath(__file__ + "/../../../src"))  # fmt: skip
from sfumato.compat.launch import launch; launch(__name__, "networks/lora_interrogator")  # fmt: skip
