"""The draft of the reference pair, distilled from its target.

The draft minimizes KL(target ‖ draft). Half of its training text is the target's own, greedy and sampled;
half are training files. The target's logits are computed once and stored as its ``TOP`` likeliest tokens,
so an epoch costs only the draft's own passes. The KL is over ``TOP`` + 1 events, those tokens and all
others: a lower bound of the full KL.

The draft's embedding starts as the principal components of the target's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from tools.train_reference_pair.train import Progress, Recipe, Sampler, Shape, autocast, run

DRAFT = Shape(hidden=256, layers=2, heads=4, kv_heads=1, mlp=640)
TOP = 64
PROMPT = 64
"""Tokens of a training file before the target continues by itself."""


@dataclass(frozen=True)
class TeacherLogits:
    """Text and the target's distributions over it.

    ``tokens`` (rows, length) int16; ``top`` (rows, length, TOP) int16 token ids and ``log_p``, their
    log-probabilities as the next token, float16.
    """

    tokens: Tensor
    top: Tensor
    log_p: Tensor

    def batch(self, step: int, rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Random ``rows``, a pure function of (seed, step): tokens, top ids, log-probabilities."""
        generator = torch.Generator().manual_seed(seed * 7919 + step)
        chosen = torch.randint(len(self.tokens), (rows,), generator=generator)
        return self.tokens[chosen].long(), self.top[chosen].long(), self.log_p[chosen].float()


@torch.inference_mode()
def write_text(target: LlamaForCausalLM, stream: Tensor, rows: int, length: int, seed: int) -> Tensor:
    """``rows`` texts of ``length`` tokens: a crop of the training files, continued by the target.

    The first half is greedy, the second sampled at T = 1.
    """
    ids = Sampler(stream, seed).batch(0, (rows, PROMPT))[:, :PROMPT]
    generator = torch.Generator().manual_seed(seed)
    cache, new, out = None, ids, [ids]
    for _ in range(length - PROMPT):
        with autocast():
            result = target(new, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, logits = result.past_key_values, result.logits[:, -1].float()
        noise = -torch.empty_like(logits).exponential_(generator=generator).log()
        noise[: rows // 2] = 0.0
        new = (logits + noise).argmax(-1, keepdim=True)
        out.append(new)
    return torch.cat(out, 1)


@torch.inference_mode()
def query_teacher(target: LlamaForCausalLM, tokens: Tensor, rows: int, progress: Progress) -> TeacherLogits:
    """The target's distributions over ``tokens`` (texts, length), ``rows`` texts at a time."""
    tops, log_ps = [], []
    for first in range(0, len(tokens), rows):
        with autocast():
            logits = target(tokens[first : first + rows].long(), use_cache=False).logits
        log_p, top = logits.float().log_softmax(-1).topk(TOP, sorted=False)
        tops.append(top.to(torch.int16))
        log_ps.append(log_p.to(torch.float16))
        done = min(first + rows, len(tokens))
        progress(done, len(tokens), float("nan"), float("nan"))
    return TeacherLogits(tokens.to(torch.int16), torch.cat(tops), torch.cat(log_ps))


def save_logits(logits: TeacherLogits, file: Path) -> None:
    """Write ``logits`` atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(".tmp")
    torch.save((logits.tokens, logits.top, logits.log_p), scratch)
    scratch.replace(file)


def load_logits(file: Path) -> TeacherLogits:
    """Read what :func:`save_logits` wrote."""
    return TeacherLogits(*torch.load(file, weights_only=True, mmap=True))


def divergence(logits: Tensor, top: Tensor, log_p: Tensor) -> Tensor:
    """Mean KL(target ‖ draft) in nats over the events "one of ``top``" and "any other".

    ``logits`` (…, vocabulary) are the draft's; ``top`` and ``log_p`` (…, TOP) the target's.
    """
    logits = logits.float()
    log_q = logits.gather(-1, top) - logits.logsumexp(-1, keepdim=True)
    p = log_p.exp()
    rest_p = (1 - p.sum(-1)).clamp_min(1e-6)
    rest_q = (1 - log_q.exp().sum(-1)).clamp_min(1e-6)
    inside = (p * (log_p - log_q)).sum(-1)
    return (inside + rest_p * (rest_p.log() - rest_q.log())).mean()


def principal_components(embedding: Tensor, size: int) -> Tensor:
    """``embedding`` (vocabulary, hidden) in its ``size`` strongest directions, with the same mean square."""
    _, _, directions = torch.linalg.svd(embedding - embedding.mean(0), full_matrices=False)
    small = embedding @ directions[:size].T
    return small * (embedding.square().mean().sqrt() / small.square().mean().sqrt())


def train_draft(
    target: LlamaForCausalLM,
    own: TeacherLogits,
    files: TeacherLogits,
    recipe: Recipe,
    folder: Path,
    progress: Progress,
    resume: bool = False,
) -> LlamaForCausalLM:
    """Distil a draft: even steps on the target's ``own`` text, odd ones on ``files``.

    A step takes ``recipe.short`` of the first kind and ``recipe.long`` of the second.
    """
    torch.manual_seed(recipe.seed + 1)
    model = LlamaForCausalLM(DRAFT.config())
    with torch.no_grad():
        weights = target.get_input_embeddings().weight
        model.get_input_embeddings().weight.copy_(principal_components(weights, DRAFT.hidden))

    def loss_of(step: int) -> Tensor:
        source, (rows, _) = (files, recipe.long) if step % 2 else (own, recipe.short)
        tokens, top, log_p = source.batch(step, rows, recipe.seed)
        return divergence(model(tokens, use_cache=False).logits, top, log_p)

    return run(model, recipe, folder, loss_of, progress, resume)
