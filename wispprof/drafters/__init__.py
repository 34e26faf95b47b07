"""Drafter backends by name: a model, prompt lookup, both, or one of your own (docs/extending.md)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wispprof.backends import Drafter
from wispprof.plugins import load
from wispprof.settings.draft_settings import LlamaSettings

if TYPE_CHECKING:
    from wispprof.drafters.gguf_model import GgufModel
    from wispprof.drafters.ngram import LookupMemory
    from wispprof.drafters.vocabulary import VocabularyMatch


@dataclass(frozen=True)
class GgufDraft:
    """A draft model for llama.cpp, loaded once for all requests. ``tokenizer``: the target's."""

    model: GgufModel
    tokenizer: Any
    match: VocabularyMatch
    device: str = field(default="cpu")

    @property
    def note(self) -> str:
        """What the user should know of the vocabulary; empty if all ids agree."""
        if self.match.same:
            return self.match.summary if self.match.hidden is not None else ""
        return f"{self.match.summary}. The draft writes text, which costs speed."


@dataclass(frozen=True)
class ServedDraft:
    """The draft model of a running ``llama-server``. ``vocab_size``: ids of the target's tokenizer.
    ``server``: what keeps it running, if it runs in this process."""

    url: str
    vocab_size: int
    device: str = "cpu"
    note: str = ""
    key: str = ""
    server: Any = None


def is_llama(draft: str) -> bool:
    """Whether llama.cpp runs this draft: ``FILE.gguf``, ``xllamacpp:FILE.gguf`` or ``llama-server:URL``."""
    return draft.endswith(".gguf") or draft.startswith("llama-server:")


def draft_folder(draft: str) -> str:
    """Where a draft of :func:`is_llama` lies, and maybe the target's tokenizer beside it."""
    return str(Path(draft.removeprefix("xllamacpp:")).parent)


def load_llama(draft: str, settings: LlamaSettings, device: str, tokenizer: Any) -> GgufDraft | ServedDraft:
    """The draft of :func:`is_llama`, compared with the target's ``tokenizer``.

    Raises the errors of loading, and :class:`ModelError` for a server with another vocabulary.
    """
    from wispprof.drafters import llama_server, xllamacpp_server

    size = max(tokenizer.get_vocab().values()) + 1
    if draft.startswith(xllamacpp_server.SCHEME):
        server = xllamacpp_server.XllamacppServer(
            Path(draft.removeprefix(xllamacpp_server.SCHEME)), settings, device
        )
        llama_server.check_served_vocabulary(server.url, tokenizer, server.key)
        return ServedDraft(server.url, size, key=server.key, server=server)
    if draft.endswith(".gguf"):
        return load_gguf(Path(draft), settings, device, tokenizer)
    url = draft.removeprefix(llama_server.SCHEME)
    llama_server.check_served_vocabulary(url, tokenizer)
    return ServedDraft(url, size)


def load_gguf(path: Path, settings: LlamaSettings, device: str, tokenizer: Any) -> GgufDraft:
    """Load a ``.gguf`` draft and compare its vocabulary with the target's ``tokenizer``.

    Raises the errors of :class:`~wispprof.drafters.gguf_model.GgufModel`.
    """
    from wispprof.drafters.gguf_model import GgufModel
    from wispprof.drafters.vocabulary import match_vocabulary

    model = GgufModel(path, settings, device)
    where = "cuda" if model.gpu_layers and device == "auto" else "cpu" if device == "auto" else device
    return GgufDraft(model, tokenizer, match_vocabulary(model.token_texts(), tokenizer), where)


def make_drafter(name: str, model: Any = None, memory: LookupMemory | None = None) -> Drafter:
    """Call the drafter factory ``name``: a function of the draft model to a
    :class:`~wispprof.backends.Drafter`.

    ``model``: a :class:`~wispprof.engines.loading.LoadedModel`, a :class:`GgufDraft`, or ``None``.
    ``memory``: what n-gram lookup knows of earlier answers.
    Raises :class:`~wispprof.errors.PluginError` for an unknown name, and what the factory raises.
    """
    if model is None and needs_model(name):
        raise ValueError(f"the drafter {name!r} needs a draft model")
    if name in DRAFTERS:
        return DRAFTERS[name](model, memory)
    drafter: Drafter = load("drafters", name, DRAFTERS)(model)
    return drafter


def needs_model(name: str) -> bool:
    """Whether this built-in drafter needs a draft model."""
    return name in ("model", "both")


def _model(model: Any, memory: LookupMemory | None) -> Drafter:
    if isinstance(model, ServedDraft):
        from wispprof.drafters.llama_server import LlamaServerDrafter

        return LlamaServerDrafter(model.url, model.vocab_size, key=model.key, server=model.server)
    if not isinstance(model, GgufDraft):
        from wispprof.drafters.torch_drafter import torch_drafter

        return torch_drafter(model)
    from wispprof.drafters.llama_cpp import LlamaCppDrafter

    if model.match.same:
        return LlamaCppDrafter(model.model, model.match.hidden)
    from wispprof.drafters.text_bridge import TextBridge
    from wispprof.drafters.token_text import TokenText

    return TextBridge(LlamaCppDrafter(model.model), model.model, TokenText(model.tokenizer))


def _lookup(model: Any, memory: LookupMemory | None) -> Drafter:
    from wispprof.drafters.ngram import LookupDrafter

    return LookupDrafter(memory)


def _both(model: Any, memory: LookupMemory | None) -> Drafter:
    from wispprof.drafters.lookup_first import LookupFirst
    from wispprof.drafters.ngram import LookupDrafter

    return LookupFirst(LookupDrafter(memory), _model(model, memory))


DRAFTERS = {"model": _model, "lookup": _lookup, "both": _both}
