"""Copies of a GGUF file with another vocabulary, weights and all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter

_TOKENS, _TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
_PRIVATE = ("GGUF.", "general.architecture")
_UNUSED = 5
_SPECIAL = 300
"""Ids below keep their place: control tokens, and the bytes that every text can be made of."""


def rewrite(source: Path, out: Path, kind: str) -> Path:
    """``padded``: 64 unused ids more. ``larger``: 64 real tokens more. ``smaller``: 64 ids less.
    ``foreign``: the same tokens under other ids."""
    reader = GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(out, architecture)
    tokens = list(reader.fields[_TOKENS].contents())
    types = list(reader.fields[_TYPES].contents())
    rows = np.arange(len(tokens))
    if kind == "padded":
        tokens += [f"[PAD{number}]" for number in range(64)]
        types += [_UNUSED] * 64
        rows = np.append(rows, rows[-64:])
    elif kind == "larger":
        tokens += [f"Ġextra{number}" for number in range(64)]
        types += [1] * 64
        rows = np.append(rows, rows[-64:])
    elif kind == "smaller":
        tokens, types, rows = tokens[:-64], types[:-64], rows[:-64]
    elif kind == "foreign":
        rows = np.append(rows[:_SPECIAL], rows[_SPECIAL:][::-1])
        tokens, types = [tokens[row] for row in rows], [types[row] for row in rows]
    else:
        raise ValueError(kind)
    changed = {_TOKENS: tokens, _TYPES: types, f"{architecture}.vocab_size": len(tokens)}
    for name, field in reader.fields.items():
        if name.startswith(_PRIVATE):
            continue
        value = changed.get(name, field.contents())
        inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, value, field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        data = tensor.data
        if tensor.name in ("token_embd.weight", "output.weight"):
            data = np.ascontiguousarray(data[rows])
        writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
