"""The formulas: objectives, timesteps, noise, losses, weightings and the randomness they draw from."""
