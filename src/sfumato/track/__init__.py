"""What a run reports: messages, progress, metrics, charts and the hub."""
