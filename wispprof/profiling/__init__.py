"""Measuring: sweeps over the verifier engine, the edge, and acceptance traces."""
