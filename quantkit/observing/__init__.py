"""Running the float model over data, and counting what its tensors hold."""
