"""Models in the hub's cache: whole, interrupted, absent; and what is fetched of a repository."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import filter_repo_objects

from wispprof.engines.model_folder import find_model
from wispprof.errors import ModelMissing

REPOSITORY = [
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "consolidated.safetensors",
    "consolidated-00001-of-00001.safetensors",
    "original/consolidated.00.pth",
    "original/params.json",
    "onnx/config.json",
    "adapter/model.safetensors",
    "pytorch_model.bin",
    "tokenizer.json",
    "tokenizer.model",
    "merges.txt",
    "chat_template.jinja",
    "README.md",
]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The snapshot folder of the repository org/model in a cache of its own."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    root = tmp_path / "models--org--model"
    snapshot = root / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("0" * 40)
    (snapshot / "config.json").write_text("{}")
    files = {f"w{i}": f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    for name in files.values():
        (snapshot / name).write_bytes(b"weights")
    return snapshot


def test_a_whole_copy_needs_no_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise AssertionError("asked the hub")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", no_network)
    assert find_model("org/model") == cache


@pytest.mark.parametrize("lost", ["model-00002-of-00002.safetensors", "config.json"])
def test_an_interrupted_download_is_completed_or_said(
    lost: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cache / lost).unlink()
    asked: list[dict[str, Any]] = []

    def download(repo: str, **how: Any) -> str:
        if not how.get("local_files_only"):
            asked.append(how)
            (cache / lost).write_bytes(b"{}")
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: None)
    with monkeypatch.context() as offline:
        offline.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(ModelMissing, match=f"incomplete.*{lost}"):
            find_model("org/model")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert asked == []
    assert find_model("org/model") == cache
    [how] = asked
    fetched = list(
        filter_repo_objects(REPOSITORY, **{k: how[k] for k in ("allow_patterns", "ignore_patterns")})
    )
    # No weights twice, nothing of subfolders.
    assert fetched == [*REPOSITORY[:5], *REPOSITORY[12:16]]


def test_a_hub_that_does_not_answer_names_what_is_missing(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cache / "model-00001-of-00002.safetensors").unlink()
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def refused(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refused)
    with pytest.raises(ModelMissing, match=r"ConnectionError.*1 of 2 weight files"):
        find_model("org/model")
