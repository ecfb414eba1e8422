"""`sfumato compare`: the saved checkpoints of a run side by side, with scores, and which of them to take."""
