"""Settings of all tests.

Property tests have no deadline, so a busy machine cannot fail them. Each test leaves wispprof's logger as it
was. Modules imported for collection are left out of later garbage collections, which would otherwise walk
through torch each time.
"""

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
