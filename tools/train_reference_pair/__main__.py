"""``python -m tools.train_reference_pair`` trains the bundled pair, or evaluates one."""

from tools.train_reference_pair.cli import app

app()
