"""Run the tool from a checkout: ``python cli.py --help``. Installed, the same is ``wispprof``."""

from wispprof.cli import app

if __name__ == "__main__":
    app(prog_name="wispprof")
