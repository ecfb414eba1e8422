"""Writes the transformer of a FLUX.1 folder of diffusers as one file; runs from a checkout, too."""

import os, sys; sys.path.insert(0, os.path.abspath(__file__ + "/../../../src"))  # fmt: skip
from sfumato.compat.launch import launch; launch(__name__, "tools/convert_diffusers_to_flux")  # fmt: skip
