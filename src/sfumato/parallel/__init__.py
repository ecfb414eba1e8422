"""The parallel strategy of a run: this process alone, or several that sum their gradients and share out the rest."""
