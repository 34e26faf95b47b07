"""Servers by name: shipped profiles of GPUs, profiles and estimators on disk."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

from wispprof.artifacts.files import bundled_path
from wispprof.artifacts.manifest import origin_shares
from wispprof.artifacts.profile import estimator_beside, load_manifest, profile_files, shipped_servers
from wispprof.errors import PlanError
from wispprof.simulation.scenario import ServerDraft, ServerModel

DEFAULT_SERVER = "h200-sxm-qwen3-32b-vllm-bf16-tp1"
"""The shipped server that stands in for one that is not given."""


def server_of(name: str) -> tuple[ServerModel, str]:
    """A server, and a note on where its times come from.

    ``name``: a shipped profile of a GPU, a profile that has its estimator beside it, or an estimator file.
    Of a profile's manifest its KV memory, its context and the step of a draft model are taken; an estimator
    alone has no limits.
    Raises :class:`PlanError` for an unknown name, and what reading files raises.
    """
    from wispprof.fitting import load_estimator

    path = Path(name)
    known = shipped_servers() if not path.exists() else {}
    # A name may hold a dot (llama-3.1), as a file's does.
    if known and name not in known and path.suffix not in (".json", ".jsonl"):
        raise PlanError(f"There is no server named {name!r}.", _hint(name, known))
    if name in known:
        path = bundled_path(f"profiles/{name}.jsonl")
    if profile_files(path)[1].exists() and estimator_beside(path).exists():
        manifest = load_manifest(path)
        note = f"server: {path.stem}, {manifest.source} ({manifest.citation or 'profile'})"
        if shares := origin_shares(manifest):
            note += f": {shares}"
        draft = ServerDraft()
        if step := manifest.summary.get("draft_step"):
            draft = ServerDraft(float(step["ms"]), float(step["row_ms"]))
            note += (
                f"; server-side drafts: {step['model']}, {step['ms']:.1f} ms + {step['row_ms']:.3f} a session"
            )
        model = ServerModel(
            load_estimator(estimator_beside(path)),
            kv_tokens=manifest.engine.get("kv_tokens"),
            max_context=manifest.model.max_context or ServerModel.max_context,
            draft=draft,
        )
        return model, note
    return ServerModel(load_estimator(path)), f"server: estimator {name}"


def _hint(name: str, known: Iterable[str]) -> str:
    """The names that resemble ``name``, not all of them; where the list is."""
    options = sorted(known)
    start = name.replace("_", "-").lower()
    near = [option for option in options if start in option] or get_close_matches(name, options, 3, 0.3)
    named = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
    return f"{named}`wispprof profile gpus` lists all names; or name an estimator file."
