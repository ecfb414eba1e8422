"""Shows the tensors of a LoRA file, and what is wrong with it; runs from a checkout without installing, too."""

import os, sys; sys.path.insert(0, os.path.abspath(__file__ + "/../../../src"))  # fmt: skip
from sfumato.compat.launch import launch; launch(__name__, "networks/check_lora_weights")  # fmt: skip
