"""Gathers the tags beside images in a metadata file, from a checkout, too."""

import os, sys; sys.path.insert(0, os.path.abspath(__file__ + "/../../../src"))  # fmt: skip
from sfumato.compat.launch import launch; launch(__name__, "finetune/merge_dd_tags_to_metadata")  # fmt: skip
