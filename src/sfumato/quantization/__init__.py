"""Frozen weights in fewer bits: how they are stored, and what reads them as the numbers that they stand for."""
