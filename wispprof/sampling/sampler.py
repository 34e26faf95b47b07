"""Drafter-invariant sampling: the target's token is ``argmax(filtered_logits / T + gumbel(seed, position))``.

This is an exact sample of the filtered target distribution (Gumbel-max), and the same token for any drafts,
batch and draft length. Filters follow transformers' logits warpers in their order: temperature, top-k (ties
at the k-th value stay), top-p (the smallest set of most likely tokens whose mass reaches ``top_p``, at
least one), min-p (tokens at least ``min_p`` times as likely as the likeliest). vLLM applies min-p before
top-p, which differs only if both are set. Source: Daliri, Musco, Suresh, "Coupling without communication and
drafter-invariant speculative decoding".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from wispprof.sampling.position_noise import gumbel, gumbel_numpy, position_keys
from wispprof.types import Sampling, TokenLogprob

MIN_TEMPERATURE = 1e-5
"""Lower temperatures are greedy, as in vLLM: logits divided by them would overflow."""

UNDECIDED = -1
"""Instead of a token where the logits are not finite."""

_MAX_TEMPERATURE = 1e30
# Most nuclei are far smaller; rows that need more candidates are drawn again among more.
CANDIDATES = 64
_CACHED_LOGITS = 1 << 16


def bounded(sampling: Sampling, vocab_size: int) -> Sampling:
    """The same settings with every number in the range that matters, so that none can overflow later."""
    logprobs = sampling.logprobs
    within = replace(
        sampling,
        temperature=min(sampling.temperature, _MAX_TEMPERATURE),
        top_k=min(sampling.top_k, vocab_size),
        seed=sampling.seed % (1 << 64),
        min_length=max(0, min(sampling.min_length, 1 << 60)),
        stop_tokens=tuple(t for t in sampling.stop_tokens if 0 <= t < vocab_size),
        logprobs=None if logprobs is None else max(0, min(logprobs, vocab_size)),
    )
    return sampling if within == sampling else within


Draw = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits (n, V), temperatures (n,), keys (n, 2)) to tokens (n,), without filters."""


def sample_tokens(
    logits: Tensor,
    positions: Sequence[int] | np.ndarray,
    samplings: Sequence[Sampling],
    draw: Draw | None = None,
) -> Tensor:
    """The target's own tokens, (n,) int64 on the device of ``logits`` (n, V).

    ``positions[i]``: position of the token that row ``i`` decides; ``samplings[i]``: its settings. ``draw``:
    :func:`draw_unfiltered` in another form, such as compiled.
    :data:`UNDECIDED` for a row with NaN or positive infinity, or without any finite logit.
    """
    if any(s.min_length for s in samplings):
        logits = mask_stop_tokens(logits, positions, samplings)
    # A NaN counts as the largest, so the largest logit tells for the whole row.
    largest, best = logits.max(-1)
    rows = [i for i, s in enumerate(samplings) if s.temperature >= MIN_TEMPERATURE]
    if rows:
        chosen = [samplings[i] for i in rows]
        drawn = _draw(logits, rows, np.asarray(positions)[rows], chosen, draw or _draw_in_parts)
        if len(rows) == len(samplings):
            best = drawn
        else:
            best[rows] = drawn
    return best.masked_fill_((largest - largest) != 0, UNDECIDED)


def mask_stop_tokens(
    logits: Tensor, positions: Sequence[int] | np.ndarray, samplings: Sequence[Sampling]
) -> Tensor:
    """A copy without the stop tokens of rows before their minimum length."""
    vocab = logits.shape[1]
    places = [
        (row, token)
        for row, (sampling, position) in enumerate(zip(samplings, positions, strict=True))
        if int(position) < sampling.min_length
        for token in sampling.stop_tokens
        if 0 <= token < vocab
    ]
    if not places:
        return logits
    rows, tokens = torch.tensor(places, device=logits.device).T
    masked = logits.clone()
    masked[rows, tokens] = -torch.inf
    return masked


def _draw(
    logits: Tensor, rows: list[int], positions: np.ndarray, chosen: Sequence[Sampling], draw: Draw
) -> Tensor:
    """Tokens of ``rows``, whose temperature is not 0."""
    words = position_keys([s.seed for s in chosen], positions).view(np.int32)
    device = logits.device
    keys = torch.from_numpy(words).to(device)
    picked = logits if len(rows) == len(logits) else logits[rows]
    temperatures = torch.tensor([divisor(s) for s in chosen], dtype=torch.float32, device=device)
    filtered = [i for i, s in enumerate(chosen) if has_filter(s)]
    if not filtered:
        return draw(picked, temperatures, keys)
    if len(filtered) == len(chosen):
        return _draw_filtered(picked.float() / temperatures[:, None], keys, chosen, CANDIDATES)
    plain = [i for i, s in enumerate(chosen) if not has_filter(s)]
    tokens = torch.empty(len(chosen), dtype=torch.int64, device=device)
    tokens[plain] = draw(picked[plain], temperatures[plain], keys[plain])
    scaled = picked[filtered].float() / temperatures[filtered, None]
    tokens[filtered] = _draw_filtered(scaled, keys[filtered], [chosen[i] for i in filtered], CANDIDATES)
    return tokens


def divisor(sampling: Sampling) -> float:
    """What logits are divided by."""
    return min(sampling.temperature, _MAX_TEMPERATURE)


def has_filter(sampling: Sampling) -> bool:
    """Whether tokens are drawn from a part of the vocabulary."""
    return sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0


def _log_min_p(sampling: Sampling) -> float:
    return math.log(sampling.min_p) if sampling.min_p > 0 else -math.inf


def _mass(sampling: Sampling) -> float:
    """The top-p, beyond any sum of probabilities where it is off."""
    return sampling.top_p if sampling.top_p < 1 else 2.0


def draw_unfiltered(logits: Tensor, temperatures: Tensor, keys: Tensor) -> Tensor:
    """``argmax(logits / T + noise)`` of each row: logits (n, V), temperatures (n,), keys (n, 2) int32."""
    ids = torch.arange(logits.shape[1], device=logits.device)
    return gumbel(keys, ids).add_(logits.float() / temperatures[:, None]).argmax(-1)


def _draw_in_parts(logits: Tensor, temperatures: Tensor, keys: Tensor) -> Tensor:
    """The same; on a CPU so few rows at a time that they stay in its cache through some 25 operations."""
    rows = max(1, _CACHED_LOGITS // logits.shape[1])
    if logits.device.type != "cpu" or len(logits) <= rows:
        return draw_unfiltered(logits, temperatures, keys)
    parts = zip(*(torch.split(one, rows) for one in (logits, temperatures, keys)), strict=True)
    return torch.cat([draw_unfiltered(*part) for part in parts])


def _draw_filtered(scaled: Tensor, keys: Tensor, samplings: Sequence[Sampling], width: int) -> Tensor:
    """Draw among the ``width`` most likely tokens; rows whose filter may keep more are drawn again."""
    values, ids, keep = likeliest_kept(scaled, samplings, width)
    scores = (values + gumbel(keys, ids)).masked_fill(~keep, -torch.inf)
    tokens = ids.gather(1, scores.argmax(1, keepdim=True))[:, 0]
    if ids.shape[1] == scaled.shape[1]:
        return tokens
    # Undecided if the last candidate stays: more tokens may belong to the filtered set.
    last = keep[:, -1]
    undecided = [i for i, stays in enumerate(last.tolist()) if stays]
    if undecided:
        tokens[undecided] = _draw_filtered(
            scaled[undecided], keys[undecided], [samplings[i] for i in undecided], ids.shape[1] * 8
        )
    return tokens


def likeliest_kept(
    scaled: Tensor, samplings: Sequence[Sampling], width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The likeliest tokens of each row of ``scaled`` (n, V), logits over the temperature, most likely first.

    Values and ids (n, m), ``m`` at least ``width`` unless the vocabulary is smaller, and bool (n, m): which
    of them the filters keep. If the last is kept, the filters may keep more.
    """
    vocab = scaled.shape[1]
    # All of a top-k must be candidates: the top-p after it is a share of their mass.
    width = min(vocab, max(width, *(min(s.top_k, vocab) + 1 for s in samplings)))
    values, ids = scaled.topk(width)
    device = scaled.device
    top_k = torch.tensor([min(s.top_k or vocab, vocab) for s in samplings], device=device)
    top_p, min_p = torch.tensor(
        [[_mass(s) for s in samplings], [_log_min_p(s) for s in samplings]],
        dtype=torch.float32,
        device=device,
    )
    floor = values.gather(1, (top_k.clamp(max=width) - 1)[:, None])
    bounded = top_k <= width
    keep = (values >= floor) | ~bounded[:, None]
    everything = torch.logsumexp(scaled, 1)
    kept = torch.logsumexp(values.masked_fill(~keep, -torch.inf), 1)
    probs = (values - torch.where(bounded, kept, everything)[:, None]).exp_()
    probs = probs.masked_fill(~keep, 0.0)
    mass = probs.cumsum(1)
    keep &= (mass - probs) < top_p[:, None]
    keep &= values >= values[:, :1] + min_p[:, None]
    keep[:, 0] = True
    return values, ids, keep


def sample_tokens_numpy(logits: np.ndarray, position: int, sampling: Sampling) -> int:
    """The same token as :func:`sample_tokens` for one row (V,) float32, in numpy, for the edge."""
    if position < sampling.min_length and sampling.stop_tokens:
        logits = logits.copy()
        logits[[t for t in sampling.stop_tokens if 0 <= t < len(logits)]] = -np.inf
    best = int(logits.argmax())
    if not np.isfinite(logits[best]):
        return UNDECIDED
    if sampling.temperature < MIN_TEMPERATURE:
        return best
    keys = position_keys([sampling.seed], [position])
    scaled = logits.astype(np.float32) / np.float32(divisor(sampling))
    if not has_filter(sampling):
        return int((gumbel_numpy(keys, np.arange(len(scaled)))[0] + scaled).argmax())
    vocab = len(scaled)
    top_k, top_p = min(sampling.top_k or vocab, vocab), _mass(sampling)
    width = max(CANDIDATES, min(sampling.top_k, vocab) + 1)
    while True:
        width = min(width, vocab)
        ids = np.argpartition(scaled, vocab - width)[vocab - width :]
        ids = ids[np.argsort(-scaled[ids], kind="stable")]
        values = scaled[ids]
        if top_k <= width:
            keep = values >= values[top_k - 1]
            total = _logsumexp(values[keep])
        else:
            keep = np.ones(width, dtype=bool)
            total = _logsumexp(scaled)
        probs = np.where(keep, np.exp(values - total), 0.0)
        keep &= (probs.cumsum() - probs) < top_p
        keep &= values >= values[0] + np.float32(_log_min_p(sampling))
        keep[0] = True
        if width == vocab or not keep[-1]:
            ids = ids[keep]
            return int(ids[(values[keep] + gumbel_numpy(keys, ids)[0]).argmax()])
        width *= 8


def token_logprobs(logits: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> tuple[TokenLogprob, ...]:
    """Log-probabilities of ``tokens`` (n,) under raw ``logits`` (n, V), and the ``counts[i]`` likeliest."""
    rows = logits.float().log_softmax(-1)
    own = rows.gather(1, torch.tensor(tokens, device=rows.device)[:, None])[:, 0].tolist()
    values, ids = (part.tolist() for part in rows.topk(min(max(counts), rows.shape[1])))
    return tuple(
        TokenLogprob(logprob, tuple(zip(ids[i][:count], values[i][:count], strict=True)))
        for i, (logprob, count) in enumerate(zip(own, counts, strict=True))
    )


def _logsumexp(values: np.ndarray) -> float:
    top = float(values.max())
    return top + float(np.log(np.exp(values - top).sum()))


def filtered_probs(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution (n, V) that a token is drawn from; for T = 0 all mass on the argmax.

    A plain reference implementation, for tests and for :func:`acceptance_rates`.
    """
    if sampling.temperature < MIN_TEMPERATURE:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    scaled = logits.float() / divisor(sampling)
    if sampling.top_k:
        floor = scaled.topk(min(sampling.top_k, scaled.shape[-1])).values[:, -1:]
        scaled = scaled.masked_fill(scaled < floor, -torch.inf)
    if sampling.top_p < 1:
        ordered, ids = scaled.sort(dim=-1, descending=True, stable=True)
        probs = ordered.softmax(-1)
        drop = (probs.cumsum(-1) - probs) >= sampling.top_p
        drop[:, 0] = False
        scaled = scaled.masked_fill(torch.zeros_like(drop).scatter(1, ids, drop), -torch.inf)
    if sampling.min_p > 0:
        scaled = scaled.masked_fill(scaled < scaled.amax(-1, keepdim=True) + _log_min_p(sampling), -torch.inf)
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
