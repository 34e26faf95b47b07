"""``python -m wispprof`` is ``wispprof``."""

from wispprof.cli import app

if __name__ == "__main__":
    app(prog_name="wispprof")
