"""Saved states of a llama.cpp sequence, for models that cannot forget single tokens.

Recurrent and hybrid models (Mamba and its relatives) fold every token into one state. To take tokens back,
the state as it was is put in place again. Only the part that cannot be cut is saved: of a hybrid model the
attention layers' KV is cut by length as usual.
"""

from __future__ import annotations

import ctypes

from wispprof.drafters.libllama import LlamaLibrary

_PARTIAL_ONLY = 1  # LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
_MOST = 40
"""States kept, the newest: more than an edge drafts ahead."""


class StateSnapshots:
    """States of sequence 0 of ``context`` by the number of tokens they hold."""

    def __init__(self, library: LlamaLibrary, context: int) -> None:
        self._library, self._context = library, context
        self._memory = library.get_memory(context)
        self._saved: dict[int, ctypes.Array[ctypes.c_uint8]] = {}

    def save(self, length: int) -> None:
        """Save the state, which holds ``length`` tokens."""
        library, context = self._library, self._context
        size = library.state_seq_get_size_ext(context, 0, _PARTIAL_ONLY)
        state = (ctypes.c_uint8 * size)()
        if size and library.state_seq_get_data_ext(context, state, size, 0, _PARTIAL_ONLY) == size:
            self._saved[length] = state
            while len(self._saved) > _MOST:
                del self._saved[min(self._saved)]

    def restore(self, length: int) -> int:
        """Go back to the newest state of at most ``length`` tokens; returns how many it holds, 0 if there is
        none."""
        library, context = self._library, self._context
        self._saved = {held: state for held, state in self._saved.items() if held <= length}
        if self._saved:
            newest = max(self._saved)
            state = self._saved[newest]
            read = library.state_seq_set_data_ext(context, state, len(state), 0, _PARTIAL_ONLY)
            if read and library.memory_seq_rm(self._memory, 0, newest, -1):
                return newest
        self._saved = {}
        library.memory_clear(self._memory, True)
        return 0
