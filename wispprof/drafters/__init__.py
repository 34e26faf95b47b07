"""Drafter backends: torch models, llama.cpp, n-gram lookup, replayed traces."""
