"""The caption editor: a local page with the images of a dataset and their captions."""
