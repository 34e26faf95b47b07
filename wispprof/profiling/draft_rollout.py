"""What the draft proposes at every position of a known text, all positions at once.

One forward over the text gives the shared keys and values, and each position's first proposal. Then every
position drafts on: its queries attend to the shared text before it (a mask) and to its own drafts. The
shared part is one matrix product for all positions, so nothing is copied per position. Tokens and features
equal those of :class:`~wispprof.drafters.torch_drafter.TorchDrafter`, position by position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wispprof.drafters.model_drafter import features_torch
from wispprof.engines.loading import LoadedModel
from wispprof.engines.torch.decoder import Decoder, decoder_for
from wispprof.engines.torch.kv_store import Attend, causal_mask, grouped_attention
from wispprof.errors import EngineError
from wispprof.sampling.candidates import noise_ranked
from wispprof.sampling.sampler import sample_tokens
from wispprof.types import Sampling

_CHUNK = 512
_LOGITS_BYTES = 64 << 20
"""Bound on the logits in memory: edge devices are small, and vocabularies have 150,000 tokens."""


@dataclass
class _Shared:
    """Keys and values of the text by layer, (kv_heads, length, d) each."""

    keys: list[Tensor]
    values: list[Tensor]
    length: int


class DraftRollout:
    """Batched continuations of one draft model."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.info = loaded.info
        self._decoder: Decoder = decoder_for(loaded.model)
        self._decoder.reserve(loaded.info.max_context)
        self._device, self._dtype = loaded.device, loaded.dtype
        self._kv_heads = loaded.info.kv_heads
        self._group = loaded.model.config.num_attention_heads // self._kv_heads
        self._rows = max(16, _LOGITS_BYTES // (4 * loaded.info.vocab_size))

    @torch.inference_mode()
    def run(
        self, tokens: Sequence[int], first: int, depth: int, sampling: Sampling
    ) -> tuple[np.ndarray, np.ndarray]:
        """Drafts (m, depth) int32 and features (m, depth, 4) float32 for ``m = len(tokens) - first``.

        Row ``i`` continues ``tokens[: first + i]``: its first draft has position ``first + i``.
        Raises :class:`EngineError` if text and drafts exceed the draft's context.
        """
        rows = len(tokens) - first
        if first < 1 or depth < 1 or rows < 1:
            raise EngineError("A rollout needs a prompt, a path and a depth of at least one token.")
        if len(tokens) + depth > self.info.max_context:
            raise EngineError(
                f"{len(tokens)} tokens and {depth} drafts exceed the draft's context of "
                f"{self.info.max_context}.",
                "Use shorter prompts or paths.",
            )
        shared, hidden = self._read(tokens[:-1], first - 1)
        drafts = np.empty((rows, depth), dtype=np.int32)
        features = np.empty((rows, depth, 4), dtype=np.float32)
        for start in range(0, rows, self._rows):
            stop = min(rows, start + self._rows)
            block = slice(start, stop)
            contexts = torch.arange(first + start, first + stop, device=self._device)
            self._roll(shared, hidden[block], contexts, sampling, drafts[block], features[block])
        return drafts, features

    @torch.inference_mode()
    def candidates(
        self, tokens: Sequence[int], first: int, sampling: Sampling, width: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The draft's first candidates (m, width) at each position from ``first``, and their probabilities.

        See :func:`~wispprof.sampling.candidates.noise_ranked`.
        """
        _, hidden = self._read(tokens[:-1], first - 1)
        ids, probs = [], []
        for start in range(0, len(hidden), self._rows):
            logits = self._decoder.logits(hidden[start : start + self._rows])
            positions = np.arange(first + start, first + start + len(logits))
            found = noise_ranked(logits, positions, sampling, width)
            ids.append(found[0].cpu().numpy())
            probs.append(found[1].cpu().numpy())
        return np.concatenate(ids), np.concatenate(probs)

    def _roll(
        self,
        shared: _Shared,
        hidden: Tensor,
        contexts: Tensor,
        sampling: Sampling,
        drafts: np.ndarray,
        features: np.ndarray,
    ) -> None:
        """Fill ``drafts`` and ``features`` for rows whose contexts have these lengths."""
        rows, depth = drafts.shape
        layers, dim = self.info.layers, self.info.head_dim
        shape = (layers, 2, rows, self._kv_heads, depth, dim)
        draft_kv = list(torch.empty(shape, dtype=self._dtype, device=self._device))
        beyond = torch.arange(shared.length, device=self._device) >= contexts[:, None]
        hide = torch.zeros(beyond.shape, device=self._device).masked_fill_(beyond, -torch.inf)
        for step in range(depth):
            if step:
                ids = torch.from_numpy(drafts[:, step - 1].astype(np.int64)).to(self._device)
                hidden = self._decoder.forward(
                    ids, contexts + (step - 1), self._attend(shared, draft_kv, hide, step)
                )
            logits = self._decoder.logits(hidden)
            positions = (contexts + step).cpu().numpy()
            chosen = sample_tokens(logits, positions, [sampling] * rows)
            drafts[:, step] = chosen.cpu().numpy()
            features[:, step] = features_torch(logits).cpu().numpy()

    def _attend(self, shared: _Shared, draft_kv: list[Tensor], hide: Tensor, step: int) -> Attend:
        """Attention of one rollout step: the visible part of the shared text, and the row's own drafts."""
        group, kv_heads, scale = self._group, self._kv_heads, self._decoder.scale

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            rows, _, dim = q.shape
            draft_k, draft_v = draft_kv[layer]
            draft_k[:, :, step - 1], draft_v[:, :, step - 1] = k, v
            own = q.view(rows, kv_heads, group, dim)
            folded = own.permute(1, 0, 2, 3).reshape(kv_heads, rows * group, dim)
            far = (folded @ shared.keys[layer].transpose(1, 2)).float()
            far = far.view(kv_heads, rows, group, -1) * scale + hide[None, :, None]
            near = (own @ draft_k[:, :, :step].transpose(2, 3)).float() * scale
            near = near.permute(1, 0, 2, 3)
            weights = torch.cat((far, near), -1).softmax(-1).to(q.dtype)
            text, drafted = weights[..., : shared.length], weights[..., shared.length :]
            out = text.reshape(kv_heads, rows * group, -1) @ shared.values[layer]
            out = out.view(kv_heads, rows, group, dim).permute(1, 0, 2, 3)
            out = out + drafted.permute(1, 0, 2, 3) @ draft_v[:, :, :step]
            mixed: Tensor = out.reshape(rows, kv_heads * group * dim)
            return mixed

        return attend

    def _read(self, tokens: Sequence[int], keep_from: int) -> tuple[_Shared, Tensor]:
        """Keys and values of ``tokens``, and hidden states from row ``keep_from`` on."""
        length = len(tokens)
        shape = (2, self.info.layers, self._kv_heads, length, self.info.head_dim)
        kv = torch.empty(shape, dtype=self._dtype, device=self._device)
        shared = _Shared(list(kv[0]), list(kv[1]), length)
        kept = []
        for start in range(0, length, _CHUNK):
            stop = min(length, start + _CHUNK)
            positions = torch.arange(start, stop, device=self._device)
            mask = causal_mask(positions[None], stop, self._group, self._dtype)

            def attend(
                layer: int,
                q: Tensor,
                k: Tensor,
                v: Tensor,
                start: int = start,
                stop: int = stop,
                mask: Tensor = mask,
            ) -> Tensor:
                keys, values = shared.keys[layer], shared.values[layer]
                keys[:, start:stop], values[:, start:stop] = k.transpose(0, 1), v.transpose(0, 1)
                seen = (keys[None, :, :stop], values[None, :, :stop])
                return grouped_attention(q[None], *seen, mask, self._decoder.scale)[0]

            ids = torch.tensor(list(tokens[start:stop]), device=self._device)
            hidden = self._decoder.forward(ids, positions, attend)
            if stop > keep_from:
                kept.append(hidden[max(0, keep_from - start) :])
        return shared, torch.cat(kept)
