"""Tools for adapter files: merge, extract, resize, convert, inspect, compare."""
