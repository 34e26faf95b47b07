"""Parts of ``benchmarks/live_edges.py``."""
