"""Makes a LoRA of the difference of two transformers of FLUX.1; runs from a checkout, too."""

import os, sys; sys.path.insert(0, os.path.abspath(__file__ + "/../../../src"))  # fmt: skip
from sfumato.compat.launch import launch; launch(__name__, "networks/flux_extract_lora")  # fmt: skip
