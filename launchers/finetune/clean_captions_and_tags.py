"""Cleans the tags and captions of a metadata file, from a checkout, too."""

import os, sys; sys.path.insert(0, os.path.abspath(__file__ + "/../../../src"))  # fmt: skip
from sfumato.compat.launch import launch; launch(__name__, "finetune/clean_captions_and_tags")  # fmt: skip
