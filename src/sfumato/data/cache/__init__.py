"""Caches of encoder outputs, keyed by the content that they are made from."""
