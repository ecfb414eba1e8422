"""Fills the cache of latents of a metadata file's images, from a checkout, too."""

import os, sys; sys.path.insert(0, os.path.abspath(__file__ + "/../../../src"))  # fmt: skip
from sfumato.compat.launch import launch; launch(__name__, "finetune/prepare_buckets_latents")  # fmt: skip
