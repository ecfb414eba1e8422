"""What one image asks for, and the denoising loop."""
