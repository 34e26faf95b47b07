"""What a draft step costs beyond the model's own forward.

    OMP_NUM_THREADS=1 python benchmarks/draft_step.py --draft FILE.gguf --threads 1
    OMP_NUM_THREADS=1 python benchmarks/draft_step.py --draft FOLDER       # torch, such as a 30-layer model

A draft step is the forward of one token, its features (confidence, entropy, margin, spread of the logits),
the draw with the position's noise, and the bookkeeping around it. The rest is compared with the forward
alone, step by step in turn, over the same context:

- torch: `TorchDrafter.forward`, the same forward without features and draw; beside it a forward of
  transformers with its own cache (goal: a step takes at most 1.1 times the forward);
- llama.cpp: `llama_decode` and `llama_synchronize` called directly on the sequence (goal: at most 1.05).

The physics. One token passes all weights once, so a forward is bound by memory bandwidth; features and draw
touch only the logits, a vector as long as the vocabulary. Their share grows with vocabulary over weights.
Medians of `--steps` pairs. A pair is a step and a forward one after the other, so that a slow moment falls
upon both. Run it on a quiet machine. The last line is JSON; exit code 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from wispprof.types import Sampling

Timed = tuple[str, Callable[[], None], Callable[[], None]]
"""Name, what is timed, what restores the context after it."""


def torch_steps(folder: str, context: int, sampling: Sampling) -> list[Timed]:
    import torch

    from wispprof.drafters.torch_drafter import TorchDrafter
    from wispprof.engines.loading import load_model

    loaded = load_model(folder, device="cpu")
    drafter = TorchDrafter(loaded)
    tokens = [(7 * i) % 1000 for i in range(context)]
    drafter.open(tokens, sampling)
    drafter.prefill()
    drafter.draft()
    drafter.rollback(context)
    model = loaded.model
    with torch.inference_mode():
        cache = model(torch.tensor([tokens[:-1]]), use_cache=True).past_key_values

    @torch.inference_mode()
    def plain() -> None:
        model(torch.tensor([tokens[-1:]]), past_key_values=cache, use_cache=True, logits_to_keep=1)

    return [
        ("draft step", lambda: _ignore(drafter.draft()), lambda: drafter.rollback(context)),
        ("forward", lambda: _ignore(drafter.forward()), lambda: None),
        ("transformers' forward", plain, lambda: cache.crop(-1)),
    ]


def llama_steps(file: str, context: int, sampling: Sampling, threads: int | None) -> list[Timed]:
    from wispprof.drafters.gguf_model import GgufModel
    from wispprof.drafters.llama_cpp import LlamaCppDrafter
    from wispprof.settings.draft_settings import LlamaSettings

    model = GgufModel(Path(file), LlamaSettings(threads=threads), "cpu")
    drafter = LlamaCppDrafter(model)
    drafter.open([(7 * i) % 1000 for i in range(context)], sampling)
    drafter.prefill()
    drafter.draft()
    drafter.rollback(context)
    lib, sequence = model.library, drafter._sequence
    batch, handle = sequence._buffers.batch, sequence._context

    def plain() -> None:
        # The batch still holds the last step's token and position.
        lib.decode(handle, batch)
        lib.synchronize(handle)
        sequence._held = context

    def forget() -> None:
        sequence.keep(context - 1)
        drafter._cached = context - 1

    return [
        ("draft step", lambda: _ignore(drafter.draft()), lambda: (drafter.rollback(context), forget())[1]),
        ("llama_decode", plain, forget),
    ]


def _ignore(value: Any) -> None:
    """Its time counts, its result does not."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--draft", required=True, help="folder of a torch draft, or .gguf file")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--temperature", type=float, default=0.0)
    args = parser.parse_args()
    gguf, sampling = args.draft.endswith(".gguf"), Sampling(args.temperature, seed=3)
    if gguf:
        kinds = llama_steps(args.draft, args.context, sampling, args.threads)
    else:
        kinds = torch_steps(args.draft, args.context, sampling)
    samples: dict[str, list[float]] = {name: [] for name, _, _ in kinds}
    for number in range(args.steps + 3):
        for name, work, restore in kinds:
            begin = time.perf_counter()
            work()
            took = (time.perf_counter() - begin) * 1000.0
            restore()
            if number >= 3:
                samples[name].append(took)
    medians = {name: statistics.median(taken) for name, taken in samples.items()}
    goal, base = (1.05, "llama_decode") if gguf else (1.1, "forward")
    ratio = statistics.median(
        step / bare for step, bare in zip(samples["draft step"], samples[base], strict=True)
    )
    for name, median in medians.items():
        print(f"{name:24} {median:8.2f} ms")
    print(f"draft step / {base}: {ratio:.3f} (goal: at most {goal})")
    print(
        json.dumps({"benchmark": "draft_step", "draft": Path(args.draft).name, "ms": medians, "ratio": ratio})
    )
    return 0 if ratio <= goal else 1


if __name__ == "__main__":
    sys.exit(main())
