"""Engine backends, and loading of models."""
