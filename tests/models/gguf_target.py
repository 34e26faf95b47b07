"""A GGUF file as a target folder: weights dequantised to float32 safetensors, and its tokenizer."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def export_target(gguf: Path, folder: Path) -> Path:
    """Write the folder, if it is not there yet, and return it."""
    if (folder / "tokenizer.json").is_file():
        return folder
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    config |= {"architectures": [type(model).__name__], "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    tokenizer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    export_target(Path(sys.argv[1]), Path(sys.argv[2]))
