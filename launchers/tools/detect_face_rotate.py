"""Writes crops around faces, from a checkout, too."""

import os, sys; sys.path.insert(0, os.path.abspath(__file__ + "/../../../src"))  # fmt: skip
from sfumato.compat.launch import launch; launch(__name__, "tools/detect_face_rotate")  # fmt: skip
