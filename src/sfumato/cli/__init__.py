"""The command `sfumato`."""
