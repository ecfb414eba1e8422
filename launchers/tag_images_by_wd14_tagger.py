"""Writes the tags that a tagger model sees in images, from a checkout, too."""

import os, sys; sys.path.insert(0, os.path.abspath(__file__ + "/../../src"))  # fmt: skip
from sfumato.compat.launch import launch; launch(__name__, "finetune/tag_images_by_wd14_tagger")  # fmt: skip
