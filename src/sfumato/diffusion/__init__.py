"""The formulas of diffusion training: objectives, timesteps, noise, losses, weightings and randomness."""
