"""Position noise and filtered argmax; numpy and torch give the same tokens."""
