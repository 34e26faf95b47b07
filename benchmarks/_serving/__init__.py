"""Parts of the serving benchmark: the bed it runs on, one run, what is asked of it, and its tables."""
