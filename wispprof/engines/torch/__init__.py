"""The built-in engine: one forward pass of the target over a ragged batch, on PyTorch."""
