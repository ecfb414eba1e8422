"""The rehearsal device: a GPU's rules and its memory, without a GPU; a model of any size runs on it in seconds."""
