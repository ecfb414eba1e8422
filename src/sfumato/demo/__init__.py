"""From nothing to a trained LoRA: toy checkpoints in the real file formats, example photos, `sfumato demo`."""
