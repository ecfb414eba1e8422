"""What a run tells: messages, progress, curves."""
