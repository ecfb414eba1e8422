"""Doing with less memory: each written once, over the repeated blocks of a part."""
