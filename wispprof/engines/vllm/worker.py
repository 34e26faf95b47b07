"""What is added to vLLM's workers: samplers that draw with the position noise, and a check of cached KV.

vLLM's own seeded sampling depends on the drafts and on the batch. These samplers take the place of a model
runner's two, on every rank: row j of a request decides the token at its number of known tokens + j, and a
draft is accepted if it is the token that the target draws there itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wispprof.sampling.sampler import Draw, draw_unfiltered, sample_tokens, token_logprobs
from wispprof.types import Sampling, TokenLogprob

SAMPLING = "wispprof_sampling"
"""Key of a request's :class:`~wispprof.types.Sampling`, as a mapping, in vLLM's ``extra_args``."""

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.08, torch.float16: 0.02}


class RowSampler:
    """Decides rows of logits for the requests of a model runner's batch.

    ``logprobs``: of the last step, by request, for those that asked. ``kept``: the last row of logits of
    each request, for a check.
    """

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._draw = None if runner.model_config.enforce_eager else _compiled(draw_unfiltered)
        self._samplings: dict[str, tuple[Any, Sampling]] = {}
        self.logprobs: dict[str, tuple[TokenLogprob, ...]] = {}
        self.kept: dict[str, Tensor] | None = None

    def decide(self, logits: Tensor, rows: np.ndarray) -> Tensor:
        """Tokens (n,) of logits (n, V), of which ``rows[i]`` belong to request i of the batch."""
        batch = self._runner.input_batch
        count = len(rows)
        first = np.cumsum(rows) - rows
        inside = np.arange(int(rows.sum())) - np.repeat(first, rows)
        positions = np.repeat(np.asarray(batch.num_tokens_no_spec[:count], dtype=np.int64), rows) + inside
        names = batch.req_ids[:count]
        each = [self._sampling(name) for name in names]
        samplings = [one for one, n in zip(each, rows.tolist(), strict=True) for _ in range(n)]
        chosen = sample_tokens(logits, positions, samplings, self._draw)
        self.logprobs = {}
        for name, one, start, n in zip(names, each, first.tolist(), rows.tolist(), strict=True):
            if one.logprobs is not None:
                span = slice(start, start + n)
                counts = [one.logprobs] * n
                self.logprobs[name] = token_logprobs(logits[span], chosen[span].clamp(min=0).tolist(), counts)
        if self.kept is not None:
            last = np.cumsum(rows) - 1
            self.kept |= {name: logits[row].clone() for name, row in zip(names, last.tolist(), strict=True)}
        return chosen

    def _sampling(self, name: str) -> Sampling:
        params = self._runner.requests[name].sampling_params
        held = self._samplings.get(name)
        if held is None or held[0] is not params:
            if len(self._samplings) > 2 * len(self._runner.requests) + 64:
                self._samplings.clear()
            fields = dict(params.extra_args[SAMPLING])
            fields["stop_tokens"] = tuple(fields["stop_tokens"])
            held = self._samplings[name] = (params, Sampling(**fields))
        return held[1]


class NoiseRejectionSampler(nn.Module):
    """In place of vLLM's ``RejectionSampler``: verifies the drafts of a step."""

    def __init__(self, rows: RowSampler) -> None:
        super().__init__()
        self._rows = rows

    def forward(
        self, metadata: Any, draft_probs: Tensor | None, logits: Tensor, sampling_metadata: Any
    ) -> Any:
        drafts = np.asarray(metadata.num_draft_tokens)
        chosen = self._rows.decide(logits, drafts + 1)
        count, width = len(drafts), int(drafts.max(initial=0)) + 1
        if width == 1:
            return _sampler_output(chosen[:, None])
        rows = drafts + 1
        inside = np.arange(int(rows.sum())) - np.repeat(np.cumsum(rows) - rows, rows)
        device = logits.device
        request = torch.from_numpy(np.repeat(np.arange(count), rows)).to(device)
        column = torch.from_numpy(inside).to(device)
        decided = torch.full((count, width), -1, dtype=torch.int64, device=device)
        decided[request, column] = chosen
        proposed = torch.full((count, width), -2, dtype=torch.int64, device=device)
        proposed_rows = torch.from_numpy(np.flatnonzero(inside < np.repeat(drafts, rows))).to(device)
        proposed[request[proposed_rows], column[proposed_rows]] = metadata.draft_token_ids.long()
        # A row is valid if the target agreed with every draft before it.
        agreed = (decided == proposed)[:, :-1].int().cumprod(1)
        decided[:, 1:].masked_fill_(agreed == 0, -1)
        return _sampler_output(decided)


class NoiseSampler(nn.Module):
    """In place of vLLM's ``Sampler``: decides a step in which no request has drafts."""

    def __init__(self, rows: RowSampler, replaced: Any) -> None:
        super().__init__()
        self._rows = rows
        self.logprobs_mode = replaced.logprobs_mode

    def forward(
        self,
        logits: Tensor,
        sampling_metadata: Any,
        predict_bonus_token: bool = False,
        logprobs_mode_override: Any = None,
    ) -> Any:
        chosen = self._rows.decide(logits, np.ones(len(logits), dtype=np.int64))
        return _sampler_output(chosen[:, None])


def _sampler_output(tokens: Tensor) -> Any:
    from vllm.v1.outputs import SamplerOutput

    return SamplerOutput(sampled_token_ids=tokens.int(), logprobs_tensors=None)


class WorkerExtension:
    """Methods of every vLLM worker, called by ``collective_rpc``."""

    model_runner: Any

    def wispprof_install(self) -> None:
        """Replace the samplers of the model runner."""
        runner = self.model_runner
        self._wispprof_rows = RowSampler(runner)
        runner.rejection_sampler = NoiseRejectionSampler(self._wispprof_rows)
        runner.sampler = NoiseSampler(self._wispprof_rows, runner.sampler)

    def wispprof_logprobs(self) -> dict[str, list[Any]]:
        """Log-probabilities of the last step, by request, as plain tuples."""
        return {name: [tuple(one) for one in rows] for name, rows in self._wispprof_rows.logprobs.items()}

    def wispprof_runner(self) -> str:
        """Class of the model runner."""
        return type(self.model_runner).__name__

    def wispprof_threads(self) -> int:
        """Compute threads of this rank on a CPU."""
        return torch.get_num_threads()

    def wispprof_parameters(self) -> int:
        """Parameters of this rank's shard."""
        return sum(one.numel() for one in self.model_runner.get_model().parameters())

    def wispprof_attention(self) -> str:
        """Attention backends of the model runner."""
        groups = [group for groups in self.model_runner.attn_groups for group in groups]
        return ", ".join(sorted({group.backend.get_name() for group in groups}))

    def wispprof_keep_logits(self, keep: bool) -> None:
        """Keep the last row of logits of every request of the following steps, or drop what was kept."""
        self._wispprof_rows.kept = {} if keep else None

    def wispprof_compare(
        self, left: tuple[str, list[list[int]]], right: tuple[str, list[list[int]]], length: int
    ) -> tuple[float, float]:
        """Largest difference between two requests that cache the same ``length`` tokens, and the largest
        that rounding explains.

        Both are relative: of the KV in full blocks, to the largest value of the block, and of the kept
        logits, which depend on all that is cached. Requests are an id and its blocks by KV group.
        """
        runner, kept = self.model_runner, self._wispprof_rows.kept
        layers = runner.compilation_config.static_forward_context
        tolerance = _TOLERANCE[runner.dtype]
        worst = _difference(kept[left[0]], kept[right[0]]) if kept else 0.0
        for group, mine, other in zip(runner.kv_cache_config.kv_cache_groups, left[1], right[1], strict=True):
            full = length // group.kv_cache_spec.block_size
            pairs = [pair for pair in zip(mine[:full], other[:full], strict=False) if all(pair)]
            for name in group.layer_names:
                cache = layers[name].kv_cache
                cache = cache[0] if isinstance(cache, list | tuple) else cache
                tolerance = max(tolerance, _TOLERANCE.get(cache.dtype, 0.25))
                # Blocks come first, or second after K and V.
                axis = 1 if cache.shape[0] == 2 and cache.dim() == 5 else 0
                for a, b in pairs:
                    worst = max(worst, _difference(cache.select(axis, a), cache.select(axis, b)))
        return worst, tolerance


def _compiled(draw: Draw) -> Draw:
    """One pass over the logits instead of some 25, as vLLM compiles its own sampler."""
    from vllm.platforms import current_platform

    compiled: Draw = torch.compile(draw, dynamic=True, backend=current_platform.simple_compile_backend)
    return compiled


def _difference(found: Tensor, expected: Tensor) -> float:
    found, expected = found.float(), expected.float()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
