"""Saving memory: gradient checkpointing and the allocator of main memory."""
