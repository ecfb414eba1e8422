"""Names and bytes on disk: key maps, checkpoints, adapter files, metadata, training state."""
