"""Trains ControlNet-LLLite for Stable Diffusion XL; runs from a checkout without installing, too."""

import os, sys; sys.path.insert(0, os.path.abspath(__file__ + "/../../src"))  # fmt: skip
from sfumato.compat.launch import launch; launch(__name__, "sdxl_train_control_net_lllite")  # fmt: skip
