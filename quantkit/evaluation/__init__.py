"""The float model and the quantized one, side by side over data."""
