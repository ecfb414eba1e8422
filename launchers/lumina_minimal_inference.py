"""Makes an image with Lumina-Image 2.0; runs from a checkout without installing, too."""

import os, sys; sys.path.insert(0, os.path.abspath(__file__ + "/../../src"))  # fmt: skip
from sfumato.compat.launch import launch; launch(__name__, "lumina_minimal_inference")  # fmt: skip
