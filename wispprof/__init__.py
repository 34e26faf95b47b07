"""wispprof: profiling, fitting, planning and a light runtime for split speculative LLM serving."""

__version__ = "0.1.0"
__all__ = ["__version__"]
