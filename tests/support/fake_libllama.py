"""A stand-in for libllama: the functions that :mod:`wispprof.drafters.libllama` binds, over a torch model."""

from __future__ import annotations

import ctypes
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch


class FakeLibllama:
    """``texts``: the vocabulary; by default made up. ``forgets``: whether a part of a sequence can be
    removed; ``saves_states``: whether its state can be put back. Counts what it loaded and read."""

    def __init__(
        self,
        loaded: Any,
        texts: list[str] | None = None,
        *,
        forgets: bool = True,
        saves_states: bool = False,
    ) -> None:
        self.saves_states = saves_states
        self._loaded = loaded
        size = loaded.info.vocab_size
        self.texts = texts or [f"t{i}" for i in range(size)]
        self._forgets = forgets
        self._held: dict[int, list[int]] = {}
        self._model_of: dict[int, int] = {}
        self._contexts = self._models = 0
        self._rows: dict[int, Any] = {}
        self.complaints: deque[str] = deque()
        self.loaded_files = 0
        self.batches: list[int] = []
        self.threads: list[tuple[int, int]] = []
        self.gpu_layers: int | None = None
        self.fails = False

    def supports_gpu_offload(self) -> bool:
        return True

    def model_default_params(self) -> Any:
        return SimpleNamespace(n_gpu_layers=0)

    def context_default_params(self) -> Any:
        return SimpleNamespace(n_ctx=0, n_batch=0, n_ubatch=0, n_seq_max=0)

    def model_load_from_file(self, path: bytes, params: Any) -> int | None:
        if Path(path.decode()).read_bytes() != b"GGUF":
            self.complaints.append("bad magic.")
            return None
        self.loaded_files += 1
        self.gpu_layers = params.n_gpu_layers
        self._models += 1
        return self._models

    def last_complaint(self) -> str:
        return self.complaints[-1].rstrip(".") if self.complaints else ""

    def model_get_vocab(self, model: int) -> int:
        return 1

    def vocab_n_tokens(self, vocab: int) -> int:
        return len(self.texts)

    def vocab_get_text(self, vocab: int, token: int) -> bytes:
        return self.texts[token].encode()

    def model_n_ctx_train(self, model: int) -> int:
        return int(self._loaded.info.max_context)

    def model_n_params(self, model: int) -> int:
        return 1234

    def model_meta_count(self, model: int) -> int:
        return 1

    def model_meta_key_by_index(self, model: int, index: int, buffer: Any, size: int) -> int:
        buffer.value = b"general.architecture"
        return 0

    def model_meta_val_str_by_index(self, model: int, index: int, buffer: Any, size: int) -> int:
        buffer.value = b"llama"
        return 0

    def init_from_model(self, model: int, params: Any) -> int:
        self._contexts += 1
        context = self._contexts
        self._model_of[context] = model
        self._held[context] = []
        return context

    def get_memory(self, context: int) -> int:
        return context

    def set_n_threads(self, context: int, threads: int, batch_threads: int) -> None:
        self.threads.append((threads, batch_threads))

    def memory_seq_rm(self, memory: int, sequence: int, first: int, last: int) -> bool:
        if 0 < first < len(self._held[memory]) and not self._forgets:
            return False
        del self._held[memory][first:]
        return True

    def memory_clear(self, memory: int, data: bool) -> None:
        self._held[memory] = []

    def state_seq_get_size_ext(self, context: int, sequence: int, flags: int) -> int:
        return 4 * len(self._held[context])

    def state_seq_get_data_ext(self, context: int, data: Any, size: int, sequence: int, flags: int) -> int:
        tokens = self._held[context]
        ctypes.memmove(data, (ctypes.c_int32 * len(tokens))(*tokens), size)
        return size

    def state_seq_set_data_ext(self, context: int, data: Any, size: int, sequence: int, flags: int) -> int:
        tokens = (ctypes.c_int32 * (size // 4))()
        ctypes.memmove(tokens, data, size)
        self._held[context] = list(tokens)
        return size

    def decode(self, context: int, batch: Any) -> int:
        if self.fails:
            return 1
        count, held = batch.n_tokens, self._held[context]
        assert list(batch.pos[:count]) == list(range(len(held), len(held) + count))
        held.extend(batch.token[:count])
        self.batches.append(count)
        if batch.logits[count - 1]:
            with torch.inference_mode():
                row = self._loaded.model(torch.tensor([held])).logits[0, -1].tolist()
            row = (row + [0.0] * len(self.texts))[: len(self.texts)]
            self._rows[context] = (ctypes.c_float * len(row))(*row)
        return 0

    def synchronize(self, context: int) -> None: ...

    def get_logits_ith(self, context: int, index: int) -> Any:
        return ctypes.cast(self._rows[context], ctypes.POINTER(ctypes.c_float))

    def free(self, context: int) -> None:
        del self._held[context], self._model_of[context]

    def model_free(self, model: int) -> None:
        assert model not in self._model_of.values(), "sequences must be freed before their model"
        self.loaded_files -= 1

    @property
    def open_contexts(self) -> int:
        return len(self._held)
