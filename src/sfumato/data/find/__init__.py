"""Finding the data: which images and captions there are, checked before torch is imported."""
