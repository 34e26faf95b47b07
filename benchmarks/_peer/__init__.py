"""Parts of ``benchmarks/vllm_peer.py``."""
