"""The C API of llama.cpp as far as a draft needs it: decode, logits, sequence removal, vocabulary.

One binding serves llama-cpp-python, llama-cpp-py-sync and a user's own ``libllama``: the shared library
is what they have in common. Parameter structures grow from version to version, so only their first
fields are declared; the rest is passed back as the library filled it in.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import sys
from collections import deque
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int8, c_int32, c_ubyte, c_uint32, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

from wispprof.errors import ModelError, ModelMissing

INSTALL_HINT = (
    "Install llama-cpp-python (`pip install llama-cpp-python`) or llama-cpp-py-sync, "
    "or name your own library with --llama-lib."
)
_PACKAGES = (("llama_cpp", "lib"), ("llama_cpp_py_sync", "."))
_NAMES = {"win32": ("llama.dll", "libllama.dll"), "darwin": ("libllama.dylib",)}
_UNKNOWN_BYTES = 1024  # more than the rest of any version's parameters


class _ModelParams(ctypes.Structure):
    _fields_ = [
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("rest", c_ubyte * _UNKNOWN_BYTES),
    ]


class _ContextParams(ctypes.Structure):
    _fields_ = [
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("rest", c_ubyte * _UNKNOWN_BYTES),
    ]


class Batch(ctypes.Structure):
    """``llama_batch``: tokens, positions, sequences, and which of them need logits."""

    _fields_ = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


_LOG = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_backend_init": (None, ()),
    "llama_log_set": (None, (_LOG, c_void_p)),
    "llama_model_default_params": (_ModelParams, ()),
    "llama_context_default_params": (_ContextParams, ()),
    "llama_model_load_from_file": (c_void_p, (c_char_p, _ModelParams)),
    "llama_model_free": (None, (c_void_p,)),
    "llama_init_from_model": (c_void_p, (c_void_p, _ContextParams)),
    "llama_free": (None, (c_void_p,)),
    "llama_set_n_threads": (None, (c_void_p, c_int32, c_int32)),
    "llama_n_ctx": (c_uint32, (c_void_p,)),
    "llama_get_memory": (c_void_p, (c_void_p,)),
    "llama_memory_seq_rm": (c_bool, (c_void_p, c_int32, c_int32, c_int32)),
    "llama_memory_clear": (None, (c_void_p, c_bool)),
    "llama_decode": (c_int32, (c_void_p, Batch)),
    "llama_synchronize": (None, (c_void_p,)),
    "llama_get_logits_ith": (POINTER(c_float), (c_void_p, c_int32)),
    "llama_model_get_vocab": (c_void_p, (c_void_p,)),
    "llama_vocab_n_tokens": (c_int32, (c_void_p,)),
    "llama_vocab_get_text": (c_char_p, (c_void_p, c_int32)),
    "llama_vocab_is_eog": (c_bool, (c_void_p, c_int32)),
    "llama_vocab_is_control": (c_bool, (c_void_p, c_int32)),
    "llama_vocab_bos": (c_int32, (c_void_p,)),
    "llama_vocab_get_add_bos": (c_bool, (c_void_p,)),
    "llama_token_to_piece": (c_int32, (c_void_p, c_int32, c_char_p, c_int32, c_int32, c_bool)),
    "llama_tokenize": (c_int32, (c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool)),
    "llama_model_n_params": (ctypes.c_uint64, (c_void_p,)),
    "llama_model_n_ctx_train": (c_int32, (c_void_p,)),
    "llama_model_meta_count": (c_int32, (c_void_p,)),
    "llama_model_meta_key_by_index": (c_int32, (c_void_p, c_int32, c_char_p, ctypes.c_size_t)),
    "llama_model_meta_val_str_by_index": (c_int32, (c_void_p, c_int32, c_char_p, ctypes.c_size_t)),
    "llama_model_meta_val_str": (c_int32, (c_void_p, c_char_p, c_char_p, ctypes.c_size_t)),
    "llama_supports_gpu_offload": (c_bool, ()),
}
_STATE = (c_void_p, c_void_p, ctypes.c_size_t, c_int32, c_uint32)
_OPTIONAL: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_state_seq_get_size_ext": (ctypes.c_size_t, (c_void_p, c_int32, c_uint32)),
    "llama_state_seq_get_data_ext": (ctypes.c_size_t, _STATE),
    "llama_state_seq_set_data_ext": (ctypes.c_size_t, _STATE),
}


class LlamaLibrary:
    """A loaded ``libllama``: its functions are attributes, without the prefix ``llama_``.

    Its log goes nowhere; :attr:`complaints` keeps the last warnings and errors for messages of ours.
    ``saves_states``: whether it can save a part of a sequence's state (October 2025 and later).
    Raises :class:`ModelMissing` without the file, :class:`ModelError` if it is no libllama of mid-2025 or
    later.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ModelMissing(f"There is no library {path}.", "Name the file of libllama.")
        self.path = path
        self.complaints: deque[str] = deque(maxlen=4)
        try:
            functions = ctypes.CDLL(str(path))
        except OSError as err:
            raise ModelError(f"Cannot load {path}: {err}.", INSTALL_HINT) from err
        for name, (result, arguments) in _FUNCTIONS.items():
            try:
                function = getattr(functions, name)
            except AttributeError:
                raise ModelError(
                    f"{path} has no {name}: it is older than July 2025 or no libllama.", INSTALL_HINT
                ) from None
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("llama_"), function)
        self.saves_states = all(hasattr(functions, name) for name in _OPTIONAL)
        for name, (result, arguments) in _OPTIONAL.items() if self.saves_states else ():
            function = getattr(functions, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("llama_"), function)
        self._log = _LOG(self._note)  # the library keeps the pointer
        self.log_set(self._log, None)
        self.backend_init()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def _note(self, level: int, text: bytes | None, data: object) -> None:
        if level in (3, 4) and text:
            self.complaints.append(text.decode("utf-8", "replace").strip())

    def last_complaint(self) -> str:
        """The newest message of the library, with its punctuation trimmed; empty if it said nothing."""
        return self.complaints[-1].rstrip(".") if self.complaints else ""


@cache
def load_libllama(path: Path | None = None) -> LlamaLibrary:
    """The library at ``path``, else that of an installed package. Raises :class:`ModelError` without any."""
    if path is not None:
        return LlamaLibrary(path)
    failures = []
    for candidate in _installed():
        try:
            return LlamaLibrary(candidate)
        except ModelError as err:
            failures.append(str(err).removesuffix(err.hint).rstrip())
    reason = " ".join(failures) or "A .gguf draft needs llama.cpp, which is not installed."
    raise ModelError(reason, INSTALL_HINT)


def _installed() -> list[Path]:
    found = []
    for package, folder in _PACKAGES:
        with contextlib.suppress(ImportError, ValueError):
            spec = importlib.util.find_spec(package)
            for place in (spec.submodule_search_locations or ()) if spec else ():
                names = _NAMES.get(sys.platform, ("libllama.so",))
                found += [file for name in names if (file := Path(place, folder, name)).is_file()]
    return found
