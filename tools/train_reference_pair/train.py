"""Training on a CPU: the loop both models of the reference pair share, and the target.

Both are plain Llama-architecture models in transformers. Matrices of the layers are trained with
Muon, the rest (embedding, norms) with AdamW, float32 master weights, products in bf16 on processors
that multiply bf16 faster. The learning rate is flat and then falls linearly to zero; the falling part
of the target's training uses longer sequences, so that the model holds up at the contexts it is
served at.

State is saved every ``save_every`` steps and found again by a later call.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tools.train_reference_pair.tokenizer import BOS, EOS

Progress = Callable[[int, int, float, float], None]
"""Called with (step, steps, loss, tokens per second)."""


@dataclass(frozen=True)
class Shape:
    """Size of a model of the pair."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    head_dim: int = 64
    vocab: int = 4096

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            intermediate_size=self.mlp,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
        )


TARGET = Shape(hidden=384, layers=8, heads=6, kv_heads=2, mlp=1024)


@dataclass(frozen=True)
class Recipe:
    """How long and how hard to train one model.

    ``short`` and ``long`` are (sequences, tokens per sequence) of a step; the target takes short ones
    in the flat part of the schedule and long ones in the falling part.
    """

    steps: int
    short: tuple[int, int] = (16, 256)
    long: tuple[int, int] = (4, 1024)
    decay_share: float = 0.3
    warmup: int = 40
    muon_lr: float = 2e-3
    adam_lr: float = 3e-3
    seed: int = 0
    save_every: int = 100

    @property
    def decay_start(self) -> int:
        return int(self.steps * (1 - self.decay_share))

    def scale(self, step: int) -> float:
        """Learning-rate factor: linear warm-up, flat, linear to zero."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return min(1.0, (self.steps - step) / (self.steps - self.decay_start))

    def batch_shape(self, step: int) -> tuple[int, int]:
        return self.short if step < self.decay_start else self.long


@cache
def autocast_bf16() -> bool:
    """Whether this processor multiplies bf16 matrices faster than float32 ones (best of three each)."""

    def best(dtype: torch.dtype) -> float:
        a, b = (torch.ones(shape, dtype=dtype) for shape in ((1024, 384), (384, 1024)))
        samples = []
        for _ in range(3):
            began = time.perf_counter()
            a @ b
            samples.append(time.perf_counter() - began)
        return min(samples)

    return best(torch.bfloat16) < best(torch.float32)


def autocast() -> torch.autocast:
    """The precision of every forward pass in training."""
    return torch.autocast("cpu", torch.bfloat16, enabled=autocast_bf16())


class Sampler:
    """Random crops of one long token stream, a pure function of (seed, step)."""

    def __init__(self, stream: Tensor, seed: int) -> None:
        self.stream, self.seed = stream, seed

    def batch(self, step: int, shape: tuple[int, int]) -> Tensor:
        """Return token ids (sequences, tokens + 1)."""
        rows, length = shape
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        starts = torch.randint(len(self.stream) - length - 1, (rows,), generator=generator)
        return torch.stack([self.stream[s : s + length + 1] for s in starts.tolist()])


def orthogonalised(matrix: Tensor, rounds: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: singular values of ``matrix`` brought near one.

    Newton-Schulz iteration with the quintic of Muon (Jordan et al., 2024).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(rounds):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for matrices, with update sizes that match AdamW's.

    As torch.optim.Muon, but in float32: torch's works in bf16, which processors without bf16 units
    emulate so slowly that it takes most of a training step.
    """

    def __init__(
        self, params: list[nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.1
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalised(p.grad.lerp(state["momentum"], group["momentum"]))
                p.mul_(1 - group["lr"] * group["decay"])
                p.add_(update, alpha=-0.2 * max(p.shape) ** 0.5 * group["lr"])


class PairOptimizer:
    """Muon for the matrices of the layers, AdamW for everything else, on one schedule."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        named = dict(model.named_parameters())
        matrices = [p for n, p in named.items() if p.ndim == 2 and "embed" not in n]
        rest = [p for n, p in named.items() if p.ndim != 2 or "embed" in n]
        self.recipe = recipe
        self.parts = (
            Muon(matrices, lr=recipe.muon_lr),
            torch.optim.AdamW(rest, lr=recipe.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
        )
        self.parameters = list(named.values())

    def step(self, step: int) -> None:
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        rates = (self.recipe.muon_lr, self.recipe.adam_lr)
        for part, rate in zip(self.parts, rates, strict=True):
            for group in part.param_groups:
                group["lr"] = rate * self.recipe.scale(step)
            part.step()
            part.zero_grad(set_to_none=True)


def _checkpoint_file(folder: Path) -> Path:
    return folder / "training.pt"


def _save(folder: Path, model: nn.Module, optimizer: PairOptimizer, step: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizer": [part.state_dict() for part in optimizer.parts],
    }
    scratch = _checkpoint_file(folder).with_suffix(".tmp")
    torch.save(state, scratch)
    scratch.replace(_checkpoint_file(folder))


def _resume(folder: Path, model: nn.Module, optimizer: PairOptimizer) -> int:
    if not _checkpoint_file(folder).exists():
        return 0
    state = torch.load(_checkpoint_file(folder), weights_only=True)
    model.load_state_dict(state["model"])
    for part, saved in zip(optimizer.parts, state["optimizer"], strict=True):
        part.load_state_dict(saved)
    return int(state["step"])


def run(
    model: LlamaForCausalLM,
    recipe: Recipe,
    folder: Path,
    loss_of: Callable[[int], Tensor],
    progress: Progress,
    resume: bool,
) -> LlamaForCausalLM:
    """The one training loop of both models; ``loss_of(step)`` gives the loss to descend."""
    optimizer = PairOptimizer(model, recipe)
    first = _resume(folder, model, optimizer) if resume else 0
    began, tokens = time.monotonic(), 0
    for step in range(first, recipe.steps):
        with autocast():
            loss = loss_of(step)
        loss.backward()
        optimizer.step(step)
        rows, length = recipe.batch_shape(step)
        tokens += rows * length
        progress(step + 1, recipe.steps, loss.item(), tokens / (time.monotonic() - began))
        if (step + 1) % recipe.save_every == 0:
            _save(folder, model, optimizer, step + 1)
    return model


def train_target(
    stream: Tensor, recipe: Recipe, folder: Path, progress: Progress, resume: bool = False
) -> LlamaForCausalLM:
    """Train the target on ``stream`` (1-D token ids) by next-token cross-entropy."""
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(TARGET.config())
    sampler = Sampler(stream, recipe.seed)

    def loss_of(step: int) -> Tensor:
        batch = sampler.batch(step, recipe.batch_shape(step))
        logits = model(batch[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())

    return run(model, recipe, folder, loss_of, progress, resume)


def write_model(model: LlamaForCausalLM, tokenizer_file: Path, folder: Path) -> None:
    """Write ``model`` in bf16 with its tokenizer as an ordinary Hugging Face folder."""
    model.to(torch.bfloat16).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_file),
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=model.config.max_position_embeddings,
    ).save_pretrained(folder)


def write_log(
    folder: Path, name: str, recipe: Recipe, shape: Shape, model: nn.Module, training_tokens: int
) -> None:
    """Write what was done (recipe, precision, shape, sizes) beside the model."""
    record = {
        "recipe": asdict(recipe),
        "precision": "bf16" if autocast_bf16() else "float32",
        "shape": asdict(shape),
        "figures": {
            "training_tokens": training_tokens,
            "parameters": sum(p.numel() for p in model.parameters()),
        },
    }
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
