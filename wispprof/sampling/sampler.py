"""Drafter-invariant sampling: the target's token is ``argmax(filtered_logits / T + gumbel(seed, position))``.

This is an exact sample of the filtered target distribution (Gumbel-max), and the same token for any drafts,
batch and draft length. Filters follow transformers' logits warpers in their order: temperature, top-k (ties
at the k-th value stay), top-p (the smallest set of most likely tokens whose mass reaches ``top_p``, at
least one). Source: Daliri, Musco, Suresh, "Coupling without communication and drafter-invariant speculative
decoding".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wispprof.sampling.position_noise import gumbel, gumbel_numpy, position_keys
from wispprof.types import Sampling

# Most nuclei are far smaller; rows that need more candidates are drawn again among more.
_CANDIDATES = 64


def sample_tokens(
    logits: Tensor, positions: Sequence[int] | np.ndarray, samplings: Sequence[Sampling]
) -> Tensor:
    """The target's own tokens, (n,) int64 on the device of ``logits`` (n, V).

    ``positions[i]``: position of the token that row ``i`` decides; ``samplings[i]``: its settings.
    """
    best = logits.argmax(-1)
    rows = [i for i, s in enumerate(samplings) if s.temperature > 0]
    if not rows:
        return best
    chosen = [samplings[i] for i in rows]
    where = np.asarray(positions)[rows]
    words = position_keys([s.seed for s in chosen], where).view(np.int32)
    device = logits.device
    keys = torch.from_numpy(words).to(device)
    picked = logits if len(rows) == len(samplings) else logits[rows]
    temperatures = torch.tensor([s.temperature for s in chosen], dtype=torch.float32, device=device)
    scaled = picked.float() / temperatures[:, None]
    filtered = [i for i, s in enumerate(chosen) if s.top_k or s.top_p < 1]
    if not filtered:
        tokens = _draw_all(scaled, keys)
    elif len(filtered) == len(chosen):
        tokens = _draw_filtered(scaled, keys, chosen, _CANDIDATES)
    else:
        plain = [i for i, s in enumerate(chosen) if not (s.top_k or s.top_p < 1)]
        tokens = best.new_empty(len(chosen))
        tokens[plain] = _draw_all(scaled[plain], keys[plain])
        tokens[filtered] = _draw_filtered(
            scaled[filtered], keys[filtered], [chosen[i] for i in filtered], _CANDIDATES
        )
    if len(rows) == len(samplings):
        return tokens
    best[rows] = tokens
    return best


def _draw_all(scaled: Tensor, keys: Tensor) -> Tensor:
    ids = torch.arange(scaled.shape[1], device=scaled.device)
    return gumbel(keys, ids).add_(scaled).argmax(-1)


def _draw_filtered(scaled: Tensor, keys: Tensor, samplings: Sequence[Sampling], width: int) -> Tensor:
    """Draw among the ``width`` most likely tokens; rows whose filter may keep more are drawn again."""
    vocab = scaled.shape[1]
    # All of a top-k must be candidates: the top-p after it is a share of their mass.
    width = min(vocab, max(width, *(s.top_k + 1 for s in samplings)))
    values, ids = scaled.topk(width)
    device = scaled.device
    top_k = torch.tensor([s.top_k or vocab for s in samplings], device=device).clamp_(max=vocab)
    top_p = torch.tensor([s.top_p for s in samplings], dtype=torch.float32, device=device)
    floor = values.gather(1, (top_k.clamp(max=width) - 1)[:, None])
    bounded = top_k <= width
    keep = (values >= floor) | ~bounded[:, None]
    everything = torch.logsumexp(scaled, 1)
    kept = torch.logsumexp(values.masked_fill(~keep, -torch.inf), 1)
    probs = (values - torch.where(bounded, kept, everything)[:, None]).exp_()
    probs = probs.masked_fill(~keep, 0.0)
    mass = probs.cumsum(1)
    keep &= (mass - probs) < top_p[:, None]
    keep[:, 0] = True
    scores = (values + gumbel(keys, ids)).masked_fill(~keep, -torch.inf)
    tokens = ids.gather(1, scores.argmax(1, keepdim=True))[:, 0]
    if width == vocab:
        return tokens
    # Undecided if the last candidate stays: more tokens may belong to the filtered set.
    last = keep[:, -1]
    undecided = [i for i, stays in enumerate(last.tolist()) if stays]
    if undecided:
        tokens[undecided] = _draw_filtered(
            scaled[undecided], keys[undecided], [samplings[i] for i in undecided], width * 8
        )
    return tokens


def sample_tokens_numpy(logits: np.ndarray, position: int, sampling: Sampling) -> int:
    """The same token as :func:`sample_tokens` for one row (V,) float32, in numpy, for the edge."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    keys = position_keys([sampling.seed], [position])
    scaled = logits.astype(np.float32) / np.float32(sampling.temperature)
    if not sampling.top_k and sampling.top_p >= 1:
        return int((gumbel_numpy(keys, np.arange(len(scaled)))[0] + scaled).argmax())
    vocab, width = len(scaled), max(_CANDIDATES, sampling.top_k + 1)
    while True:
        width = min(width, vocab)
        ids = np.argpartition(scaled, vocab - width)[vocab - width :]
        ids = ids[np.argsort(-scaled[ids], kind="stable")]
        values = scaled[ids]
        top_k = min(sampling.top_k or vocab, vocab)
        if top_k <= width:
            keep = values >= values[top_k - 1]
            total = _logsumexp(values[keep])
        else:
            keep = np.ones(width, dtype=bool)
            total = _logsumexp(scaled)
        probs = np.where(keep, np.exp(values - total), 0.0)
        keep &= (probs.cumsum() - probs) < sampling.top_p
        keep[0] = True
        if width == vocab or not keep[-1]:
            ids = ids[keep]
            return int(ids[(values[keep] + gumbel_numpy(keys, ids)[0]).argmax()])
        width *= 8


def _logsumexp(values: np.ndarray) -> float:
    top = float(values.max())
    return top + float(np.log(np.exp(values - top).sum()))


def filtered_probs(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution (n, V) that a token is drawn from; for T = 0 all mass on the argmax.

    A plain reference implementation, for tests and for :func:`acceptance_rates`.
    """
    if sampling.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    scaled = logits.float() / sampling.temperature
    if sampling.top_k:
        floor = scaled.topk(min(sampling.top_k, scaled.shape[-1])).values[:, -1:]
        scaled = scaled.masked_fill(scaled < floor, -torch.inf)
    if sampling.top_p < 1:
        ordered, ids = scaled.sort(dim=-1, descending=True, stable=True)
        probs = ordered.softmax(-1)
        drop = (probs.cumsum(-1) - probs) >= sampling.top_p
        drop[:, 0] = False
        scaled = scaled.masked_fill(torch.zeros_like(drop).scatter(1, ids, drop), -torch.inf)
    return scaled.softmax(-1)


@dataclass(frozen=True, slots=True)
class AcceptanceRates:
    """How often target and draft agree on the next token, averaged over rows.

    ``best``: Σ min(p, q), the upper bound of any method. ``same_noise``: both drawn with the position's
    noise, as here. ``independent``: Σ p·q, drawn independently.
    """

    best: float
    same_noise: float
    independent: float


def acceptance_rates(
    target_logits: Tensor, draft_logits: Tensor, sampling: Sampling, draws: int = 64
) -> AcceptanceRates:
    """Agreement of two models on the same positions, from raw logits (n, V) of each.

    ``same_noise`` averages over ``draws`` seeds from ``sampling.seed`` on.
    """
    p, q = filtered_probs(target_logits, sampling), filtered_probs(draft_logits, sampling)
    positions = np.arange(len(p))
    log_p, log_q = p.log(), q.log()
    ids = torch.arange(p.shape[1], device=p.device)
    hits = 0.0
    for draw in range(draws):
        words = position_keys([sampling.seed + draw] * len(p), positions).view(np.int32)
        noise = gumbel(torch.from_numpy(words).to(p.device), ids)
        same = (noise + log_p).argmax(-1) == (noise + log_q).argmax(-1)
        hits += float(same.float().mean())
    return AcceptanceRates(
        best=float(torch.minimum(p, q).sum(-1).mean()),
        same_noise=hits / draws,
        independent=float((p * q).sum(-1).mean()),
    )
