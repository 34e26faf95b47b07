"""For all tests: property tests answer right or wrong, never slow, so a busy machine cannot fail them; a
command that a test runs in this process leaves the tool's logger as it was; and what was imported to collect
the tests is left out of every later garbage collection, which otherwise walks through torch each time."""

from __future__ import annotations

import gc
import logging
import os
import shutil
from collections.abc import Iterator

import pytest
from hypothesis import settings

# Without a GPU, Triton kernels run in Triton's interpreter, which it chooses when it is first imported.
if shutil.which("nvidia-smi") is None:
    os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile("wispprof", deadline=None)
settings.load_profile("wispprof")


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _logger_as_it_was() -> Iterator[None]:
    logger = logging.getLogger("wispprof")
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers, logger.propagate = handlers, propagate
    logger.setLevel(level)
