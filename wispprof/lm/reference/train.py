"""Training of the reference pair on a CPU: a target from text, then a draft distilled from it.

Both are plain Llama-architecture models in transformers. Matrices of the layers are trained with
Muon, the rest (embedding, norms) with AdamW, under bf16 autocast with float32 master weights. The
learning rate is flat and then falls linearly to zero; the falling part of the target's training uses
longer sequences, so that the model holds up at the contexts it is served at.

The draft minimises KL(target ‖ draft) on a mixture of file text and text that the target itself
wrote, because what it will have to predict is the target's output rather than the files.

State is saved every ``save_every`` steps and found again by ``--resume``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from wispprof.lm.reference import corpus

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
DRAFT = Shape(hidden=192, layers=2, heads=3, kv_heads=1, mlp=512)


@dataclass(frozen=True)
class Recipe:
    """How long and how hard to train one model.

    ``short`` and ``long`` are (sequences, tokens per sequence) of a step in the flat and in the
    falling part of the schedule.
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


class PairOptimizer:
    """Muon for the matrices of the layers, AdamW for everything else, on one schedule."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        named = dict(model.named_parameters())
        matrices = [p for n, p in named.items() if p.ndim == 2 and "embed" not in n]
        rest = [p for n, p in named.items() if p.ndim != 2 or "embed" in n]
        self.recipe = recipe
        self.parts = (
            torch.optim.Muon(
                matrices, lr=recipe.muon_lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
            ),
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


def _run(
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
        with torch.autocast("cpu", torch.bfloat16):
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

    return _run(model, recipe, folder, loss_of, progress, resume)


@torch.inference_mode()
def self_text(
    target: LlamaForCausalLM, stream: Tensor, rows: int, seed: int, prompt: int = 64, new: int = 192
) -> Iterator[Tensor]:
    """Endless batches (rows, prompt + new) of the target continuing text of the training files.

    Half of the rows are greedy and half sampled at T = 1, as its users will ask for both.
    """
    sampler = Sampler(stream, seed + 1)
    generator = torch.Generator().manual_seed(seed)
    step = 0
    while True:
        ids = sampler.batch(step, (rows, prompt))[:, :prompt]
        step += 1
        cache = None
        feed, out = ids, [ids]
        for _ in range(new):
            with torch.autocast("cpu", torch.bfloat16):
                result = target(feed, past_key_values=cache, use_cache=True)
            cache, logits = result.past_key_values, result.logits[:, -1].float()
            noise = -torch.empty_like(logits).exponential_(generator=generator).log()
            noise[: rows // 2] = 0.0
            feed = (logits + noise).argmax(-1, keepdim=True)
            out.append(feed)
        yield torch.cat(out, 1)


def train_draft(
    target: LlamaForCausalLM,
    stream: Tensor,
    recipe: Recipe,
    folder: Path,
    progress: Progress,
    resume: bool = False,
    pool: Tensor | None = None,
) -> LlamaForCausalLM:
    """Distil a draft from ``target``.

    ``pool`` (rows, tokens) holds text written by the target (see :func:`self_text`); where given,
    every second step of the short part trains on it.
    """
    torch.manual_seed(recipe.seed + 1)
    model = LlamaForCausalLM(DRAFT.config())
    sampler = Sampler(stream, recipe.seed + 2)
    target = target.eval().requires_grad_(False)

    def batch_of(step: int) -> Tensor:
        rows, length = recipe.batch_shape(step)
        if pool is None or step % 2 or length >= pool.shape[1]:
            return sampler.batch(step, (rows, length))[:, :-1]
        generator = torch.Generator().manual_seed(recipe.seed * 7919 + step)
        return pool[torch.randint(len(pool), (rows,), generator=generator)]

    def loss_of(step: int) -> Tensor:
        batch = batch_of(step)
        with torch.no_grad():
            wanted = target(batch, use_cache=False).logits.float().log_softmax(-1)
        got = model(batch, use_cache=False).logits.float().log_softmax(-1)
        return F.kl_div(got, wanted, log_target=True, reduction="none").sum(-1).mean()

    return _run(model, recipe, folder, loss_of, progress, resume)


def write_model(model: LlamaForCausalLM, tokenizer_file: Path, folder: Path) -> None:
    """Write ``model`` in bf16 with its tokenizer as an ordinary Hugging Face folder."""
    model.to(torch.bfloat16).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_file),
        bos_token=corpus.BOS,
        eos_token=corpus.EOS,
        model_max_length=model.config.max_position_embeddings,
    ).save_pretrained(folder)


def write_log(folder: Path, name: str, recipe: Recipe, shape: Shape, **figures: float) -> None:
    """Write what was done (recipe, shape, figures) beside the model."""
    record = {"recipe": asdict(recipe), "shape": asdict(shape), "figures": figures}
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
