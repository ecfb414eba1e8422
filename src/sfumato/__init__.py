"""sfumato trains, fine-tunes and samples image diffusion models."""

__version__ = "0.1.0"
