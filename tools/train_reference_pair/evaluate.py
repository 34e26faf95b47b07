"""Loss, repetition, step time and agreement of a pair on held-out files.

All are computed by plain transformers, so they do not depend on this project's engine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase

from wispprof.profiling.prompts import collect_sources
from wispprof.sampling.sampler import AcceptanceRates, acceptance_rates
from wispprof.types import Sampling


@dataclass(frozen=True)
class HeldOutLoss:
    """Cross-entropy on held-out files, in nats per token and, comparable between tokenizers, per byte."""

    per_token: float
    per_byte: float
    tokens: int


def held_out_texts() -> list[str]:
    """The held-out files of the corpus, whole."""
    return [f.text for f in collect_sources()[1]]


@torch.inference_mode()
def held_out_loss(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    window: int = 512,
    max_windows: int = 200,
) -> HeldOutLoss:
    """Mean loss over windows of ``window`` tokens cut from ``texts``, evenly over all of them."""
    windows = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        windows += [ids[i : i + window + 1] for i in range(0, len(ids) - window, window)]
    windows = windows[:: max(1, len(windows) // max_windows)]
    nats = tokens = size = 0.0
    for ids in windows:
        batch = torch.tensor([ids])
        logits = model(batch[:, :-1], use_cache=False).logits[0].float()
        nats += F.cross_entropy(logits, batch[0, 1:], reduction="sum").item()
        tokens += len(ids) - 1
        size += len(tokenizer.decode(ids[1:]).encode())
    return HeldOutLoss(nats / tokens, nats / size, int(tokens))


@torch.inference_mode()
def repetition(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    prompts: int = 24,
    prompt: int = 96,
    new: int = 128,
) -> float:
    """Share of 4-grams in greedy continuations that occurred before in the same continuation."""
    rows = [tokenizer(t, add_special_tokens=False).input_ids for t in texts]
    rows = [r[:prompt] for r in rows if len(r) >= prompt][:prompts]
    out = model.generate(
        torch.tensor(rows),
        attention_mask=torch.ones(len(rows), prompt, dtype=torch.long),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=1,
    )
    shares = []
    for row in out[:, prompt:].tolist():
        grams = [tuple(row[i : i + 4]) for i in range(len(row) - 3)]
        shares.append(1 - len(set(grams)) / len(grams))
    return statistics.mean(shares)


@torch.inference_mode()
def step_ms(model: Any, context: int = 128, repeats: int = 60) -> float:
    """Median ms of one greedy token over ``context`` cached ones, transformers' own cache."""
    ids = torch.randint(4, model.config.vocab_size, (1, context))
    cache = model(ids, use_cache=True).past_key_values
    samples = []
    for _ in range(repeats):
        began = time.perf_counter()
        model(ids[:, :1], past_key_values=cache, use_cache=True)
        samples.append(1000 * (time.perf_counter() - began))
        cache.crop(-1)
    return statistics.median(samples)


@torch.inference_mode()
def agreement_table(
    target: Any,
    draft: Any,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    samplings: Sequence[Sampling],
    files: int = 24,
    context: int = 128,
    positions: int = 32,
) -> list[AcceptanceRates]:
    """How often the two agree on the next token of held-out text, for each sampling.

    Taken at ``positions`` positions after ``context`` tokens of each of ``files`` files.
    """
    rows = [tokenizer(t, add_special_tokens=False).input_ids for t in texts]
    length = context + positions
    ids = torch.tensor([row[:length] for row in rows if len(row) >= length][:files])
    p, q = (model(ids, use_cache=False).logits[:, context:].flatten(0, 1) for model in (target, draft))
    return [acceptance_rates(p, q, sampling, draws=16) for sampling in samplings]
