"""A GGUF file loaded once, and sequences of it: each has its own KV cache, all share the weights."""

from __future__ import annotations

import ctypes
import hashlib
import json
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from wispprof.drafters.core_budget import CoreBudget
from wispprof.drafters.libllama import Batch, LlamaLibrary, load_libllama
from wispprof.drafters.llama_snapshots import StateSnapshots
from wispprof.errors import EngineError, ModelError, ModelMissing, ModelUnsupported
from wispprof.settings.draft_settings import LlamaSettings
from wispprof.types import ModelInfo

_BATCH_CPU, _BATCH_GPU = 128, 512
_ALL_LAYERS = 999
_NO_KV_SLOT = 1


class _Weights:
    """Frees a model once nothing refers to it: the model itself, and every context made of it."""

    def __init__(self, library: LlamaLibrary, handle: int) -> None:
        self._free = weakref.finalize(self, library.model_free, handle)


def _free_context(library: LlamaLibrary, context: int, weights: _Weights) -> None:
    """``weights`` live until here: a context must be freed before its model."""
    library.free(context)


class GgufModel:
    """The weights and the vocabulary of a ``.gguf`` file. ``device``: ``cpu`` keeps every layer there.

    Raises :class:`ModelMissing` without the file, :class:`ModelError` without libllama or if it cannot
    load the file.
    """

    def __init__(
        self,
        path: Path,
        settings: LlamaSettings | None = None,
        device: str = "auto",
        *,
        library: LlamaLibrary | None = None,
    ) -> None:
        self.path, self.settings, self.device = path, settings or LlamaSettings(), device
        if not path.is_file():
            raise ModelMissing(f"There is no model file {path}.", "Give a .gguf file.")
        self.library = lib = library or load_libllama(self.settings.llama_lib)
        self.gpu_layers = 0
        if device != "cpu" and lib.supports_gpu_offload():
            chosen = self.settings.gpu_layers
            self.gpu_layers = _ALL_LAYERS if chosen is None else chosen
        params = lib.model_default_params()
        params.n_gpu_layers = self.gpu_layers
        lib.complaints.clear()
        self.handle = lib.model_load_from_file(str(path).encode(), params)
        if not self.handle:
            reason = lib.last_complaint() or "it is damaged, or of an unknown architecture"
            raise ModelError(f"llama.cpp cannot load {path}: {reason}.", "Download the file again.")
        self.weights = _Weights(lib, self.handle)
        self.budget = CoreBudget(self.settings.threads)
        self.vocabulary = lib.model_get_vocab(self.handle)
        self.vocab_size = int(lib.vocab_n_tokens(self.vocabulary))
        trained = int(lib.model_n_ctx_train(self.handle))
        self.max_context = min(self.settings.draft_context, trained or self.settings.draft_context)

    @cached_property
    def info(self) -> ModelInfo:
        """The model as manifests record it. The hash is of the metadata: the tensors are left out."""
        facts = self.metadata
        text = json.dumps(facts, sort_keys=True)
        return ModelInfo(
            id=self.path.name,
            dtype="gguf",
            parameters=int(self.library.model_n_params(self.handle)),
            family=facts.get("general.architecture", ""),
            config_hash=hashlib.blake2b(text.encode(), digest_size=8).hexdigest(),
            max_context=self.max_context,
            vocab_size=self.vocab_size,
        )

    @cached_property
    def metadata(self) -> dict[str, str]:
        """The file's own metadata; long values are cut."""
        lib, buffer = self.library, ctypes.create_string_buffer(4096)
        found = {}
        for index in range(lib.model_meta_count(self.handle)):
            if lib.model_meta_key_by_index(self.handle, index, buffer, len(buffer)) < 0:
                continue
            key = buffer.value.decode("utf-8", "replace")
            lib.model_meta_val_str_by_index(self.handle, index, buffer, len(buffer))
            found[key] = buffer.value.decode("utf-8", "replace")
        return found

    # --- vocabulary ---

    def token_texts(self) -> list[str]:
        """The text of every token id as the file spells it (``Ġthe``, ``▁the``, ``<0x0A>``)."""
        text = self.library.vocab_get_text
        return [(text(self.vocabulary, i) or b"").decode("utf-8", "replace") for i in range(self.vocab_size)]

    def piece(self, token: int) -> bytes:
        """The bytes that a token adds to a text; nothing for a control token."""
        buffer = ctypes.create_string_buffer(512)
        size = self.library.token_to_piece(self.vocabulary, token, buffer, len(buffer), 0, False)
        return buffer.raw[: max(0, size)]

    def is_end(self, token: int) -> bool:
        """Whether the model ends its answer with this token."""
        return bool(self.library.vocab_is_eog(self.vocabulary, token))

    def encode(self, text: bytes, *, start: bool = False) -> list[int]:
        """Token ids of a text; ``start``: with the beginning-of-sequence token, if the model wants one."""
        size = len(text) + 2
        ids = (ctypes.c_int32 * size)()
        count = self.library.tokenize(self.vocabulary, text, len(text), ids, size, start, False)
        if count < 0:
            raise EngineError(f"llama.cpp could not tokenize {len(text)} bytes.")
        return list(ids[:count])


@dataclass
class _Buffers:
    """One batch's arrays, made once: a decode of one token must cost nothing beside the model."""

    size: int
    batch: Batch = field(init=False)

    def __post_init__(self) -> None:
        size = self.size
        self.tokens = (ctypes.c_int32 * size)()
        self.positions = (ctypes.c_int32 * size)()
        self.counts = (ctypes.c_int32 * size)(*[1] * size)
        self.first = (ctypes.c_int32 * 1)(0)
        pointer = ctypes.cast(self.first, ctypes.POINTER(ctypes.c_int32))
        self.sequences = (ctypes.POINTER(ctypes.c_int32) * size)(*[pointer] * size)
        self.wanted = (ctypes.c_int8 * size)()
        self.batch = Batch(
            0,
            ctypes.cast(self.tokens, ctypes.POINTER(ctypes.c_int32)),
            None,
            ctypes.cast(self.positions, ctypes.POINTER(ctypes.c_int32)),
            ctypes.cast(self.counts, ctypes.POINTER(ctypes.c_int32)),
            self.sequences,
            ctypes.cast(self.wanted, ctypes.POINTER(ctypes.c_int8)),
        )


class GgufSequence:
    """One KV cache over a :class:`GgufModel`, freed with the object. Not thread-safe.

    Warmed up when made. Raises :class:`ModelUnsupported` if the model cannot forget single tokens and the
    library cannot save states either.
    """

    def __init__(self, model: GgufModel) -> None:
        self.model = model
        lib = model.library
        self._size = min(model.max_context, _BATCH_GPU if model.gpu_layers else _BATCH_CPU)
        params = lib.context_default_params()
        params.n_ctx, params.n_seq_max = model.max_context, 1
        params.n_batch = params.n_ubatch = self._size
        lib.complaints.clear()
        self._context = lib.init_from_model(model.handle, params)
        if not self._context:
            reason = lib.last_complaint() or "out of memory"
            raise ModelError(
                f"llama.cpp cannot make a context of {model.max_context} tokens: {reason}.",
                "Give a smaller --draft-context.",
            )
        self._free = weakref.finalize(self, _free_context, lib, self._context, model.weights)
        self._memory = lib.get_memory(self._context)
        self._buffers = _Buffers(self._size)
        self._threads = (0, 0)
        self._held = 0
        self._snapshots: StateSnapshots | None = None
        self._learn_to_forget()

    def _learn_to_forget(self) -> None:
        """Warm up, and find out how the last token can be forgotten."""
        self.decode([0, 0], 0)
        if not self.model.library.memory_seq_rm(self._memory, 0, 1, -1):
            if self.model.library.saves_states:
                self._snapshots = StateSnapshots(self.model.library, self._context)
                self.keep(0)
                self.decode([0], 0)
                self.decode([0], 1)
            if self.keep(1) != 1:
                self.close()
                raise ModelUnsupported(
                    f"{self.model.path.name} keeps recurrent state, which this llama.cpp cannot take back.",
                    "Use a transformer as the draft, or a llama.cpp of October 2025 or later.",
                )
        self.keep(0)

    def decode(self, tokens: Sequence[int], start: int) -> None:
        """Read ``tokens`` at positions from ``start`` on; :meth:`logits` are the last one's."""
        for first in range(0, len(tokens), self._size):
            part = tokens[first : first + self._size]
            self._decode(part, start + first, last=first + len(part) == len(tokens))

    def _decode(self, tokens: Sequence[int], start: int, last: bool) -> None:
        lib, buffers, count = self.model.library, self._buffers, len(tokens)
        buffers.tokens[:count] = list(tokens)
        buffers.positions[:count] = list(range(start, start + count))
        buffers.wanted[:count] = [0] * count
        buffers.wanted[count - 1] = int(last)
        buffers.batch.n_tokens = count
        budget = self.model.budget
        threads = budget.threads
        if (wanted := (threads, self.model.settings.batch_threads or threads)) != self._threads:
            lib.set_n_threads(self._context, *wanted)
            self._threads = wanted
        begin = time.perf_counter()
        code = lib.decode(self._context, buffers.batch)
        lib.synchronize(self._context)
        budget.ran(time.perf_counter() - begin, self._threads[count > 1])
        if code:
            reason = "its context is full" if code == _NO_KV_SLOT else f"code {code}"
            raise EngineError(f"llama.cpp failed to decode: {reason}.", "Give a larger --draft-context.")
        self._held = start + count
        if self._snapshots is not None and last:
            self._snapshots.save(self._held)

    def logits(self) -> np.ndarray:
        """The logits (V,) float32 after the last token decoded: llama.cpp's own memory until the next decode,
        free to be written to. Copies of such size cost as many page faults as they have pages."""
        pointer = self.model.library.get_logits_ith(self._context, -1)
        if not pointer:
            raise EngineError("llama.cpp gave no logits.")
        return np.ctypeslib.as_array(pointer, shape=(self.model.vocab_size,))

    def keep(self, length: int) -> int:
        """Forget everything from position ``length`` on; returns how many tokens are still held: fewer if the
        model can only go back to a saved state."""
        lib = self.model.library
        if not length:
            lib.memory_clear(self._memory, True)
            self._held = 0
        elif length < self._held:
            if self._snapshots is not None:
                self._held = self._snapshots.restore(length)
            elif lib.memory_seq_rm(self._memory, 0, length, -1):
                self._held = length
            else:
                return self.keep(0)
        return min(length, self._held)

    def close(self) -> None:
        """Free the KV cache now; the sequence must not be used afterwards."""
        self._free()
