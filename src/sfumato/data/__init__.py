"""Feeds training data: buckets, images, captions, caches, batches; independent of the model family."""
