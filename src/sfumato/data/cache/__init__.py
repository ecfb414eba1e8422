"""Encoders' outputs, kept by the content they were made from."""
