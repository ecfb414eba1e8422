"""Writes captions of images by GIT, from a checkout, too."""

import os, sys; sys.path.insert(0, os.path.abspath(__file__ + "/../../../src"))  # fmt: skip
from sfumato.compat.launch import launch; launch(__name__, "finetune/make_captions_by_git")  # fmt: skip
