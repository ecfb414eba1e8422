"""Saving memory and time: gradient checkpointing, compiling, and the allocator of main memory."""
