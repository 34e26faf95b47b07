"""Where a model's files are: a folder in Hugging Face layout, or a hub id that is fetched into the cache."""

from __future__ import annotations

import json
import os
from pathlib import Path

from wispprof.errors import ModelError, ModelMissing

INCOMPLETE = "Check that the download is complete (config.json and all *.safetensors)."

_PATTERNS = ["*.json", "model*.safetensors", "*.model", "*.txt", "*.jinja"]
# Some repositories hold the weights a second time: consolidated, or in a subfolder.
_IGNORED = ["*/*", "consolidated*"]


def find_model(path_or_id: str) -> Path:
    """The folder with a model's files. The hub is asked only for a name that looks like a hub id.

    Raises :class:`ModelMissing` if there is no such model.
    """
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelMissing(
                f"The folder {folder} holds no config.json.",
                "Give a folder in Hugging Face layout (config.json, *.safetensors, tokenizer).",
            )
        return folder
    parts = path_or_id.split("/")
    looks_like_path = path_or_id.startswith((".", "~", "/")) or len(parts) != 2 or folder.exists()
    if looks_like_path or folder.parent.is_dir():
        raise ModelMissing(
            f"There is no model folder at {path_or_id}.",
            "Give a folder with config.json and *.safetensors, or a hub id such as Qwen/Qwen3-8B.",
        )
    return _find_on_hub(path_or_id)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the model: those of its index, or the only one.

    Raises :class:`ModelError` if one of them is missing or the index cannot be read.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
            raise ModelError(f"The index {index} cannot be read.", INCOMPLETE) from err
    else:
        names = ["model.safetensors"]
    missing = [name for name in names if not (folder / name).is_file()]
    if not index.is_file() and missing:
        raise ModelError(f"The model in {folder} cannot be read: it holds no *.safetensors.", INCOMPLETE)
    if missing or not names:
        raise ModelError(
            f"The model in {folder} cannot be read: {len(missing)} of {len(names)} weight files are missing "
            f"({', '.join(missing[:3])}).",
            INCOMPLETE,
        )
    return [folder / name for name in names]


def _find_on_hub(repo: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    hint = "Download the model into a folder and give that folder, or check the id and the network."
    cached = ""
    try:
        folder = Path(snapshot_download(repo, local_files_only=True))
        weight_files(folder)
        if (folder / "config.json").is_file():
            return folder
        cached = "config.json is missing"
    except HFValidationError as err:
        raise ModelMissing(f"{repo} is neither a folder nor a hub id.", hint) from err
    except LocalEntryNotFoundError:
        pass  # not in the local cache
    except ModelError as err:  # an interrupted download
        cached = err.args[0]
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        state = (
            f"is incomplete in the local hub cache ({cached})" if cached else "is not in the local hub cache"
        )
        raise ModelMissing(f"{repo} {state}, and HF_HUB_OFFLINE is set.", hint)
    try:
        HfApi().model_info(repo, timeout=5.0)
        return Path(
            snapshot_download(repo, allow_patterns=_PATTERNS, ignore_patterns=_IGNORED, etag_timeout=5.0)
        )
    except Exception as err:
        reason = type(err).__name__
        state = f"The local copy is incomplete: {cached}" if cached else "It is not in the local hub cache."
        raise ModelMissing(f"The hub did not return {repo} ({reason}). {state}", hint) from err
