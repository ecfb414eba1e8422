"""What every stage uses: files written whole, registries, seeds, old option names; knows nothing of models or data."""
