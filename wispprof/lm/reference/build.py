"""The whole recipe of the reference pair in one call: corpus, tokenizer, target, draft.

Each part is kept in a work folder, so an interrupted build goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaForCausalLM

from wispprof.lm.reference import corpus, train

TARGET_RECIPE = train.Recipe(steps=1300, decay_share=0.25)
DRAFT_RECIPE = train.Recipe(steps=1100, decay_share=0.25, short=(16, 256), long=(4, 1024))
POOL_BATCHES, POOL_ROWS = 24, 64

Reporter = Callable[[str], train.Progress]
"""Given the name of a part ("target", "draft", …), returns its progress callback."""


def training_stream(tokenizer: Tokenizer) -> Tensor:
    """All training files as one 1-D stream of token ids, in a fixed order."""
    files, _ = corpus.collect()
    return torch.tensor([t for ids in corpus.encode(tokenizer, files) for t in ids])


def _tokenizer(file: Path) -> Tokenizer:
    if not file.exists():
        files, _ = corpus.collect()
        file.parent.mkdir(parents=True, exist_ok=True)
        corpus.train_tokenizer(files).save(str(file))
    return Tokenizer.from_file(str(file))


def _pool(target: LlamaForCausalLM, stream: Tensor, file: Path, progress: train.Progress) -> Tensor:
    """Text the target wrote, (rows, tokens); made once, then read from ``file``."""
    if not file.exists():
        batches = []
        for i, rows in enumerate(train.self_text(target, stream, POOL_ROWS, seed=11), 1):
            batches.append(rows)
            progress(i, POOL_BATCHES, float("nan"), float("nan"))
            if i == POOL_BATCHES:
                break
        scratch = file.with_suffix(".tmp")
        torch.save(torch.cat(batches), scratch)
        scratch.replace(file)
    return torch.load(file, weights_only=True)


def build_pair(
    out: Path,
    work: Path,
    report: Reporter,
    target_recipe: train.Recipe = TARGET_RECIPE,
    draft_recipe: train.Recipe = DRAFT_RECIPE,
    resume: bool = True,
) -> None:
    """Train both models and write ``out/target`` and ``out/draft`` as Hugging Face folders.

    ``work`` holds the tokenizer, checkpoints and the target's own text; with ``resume`` a build
    that was interrupted goes on from there.
    """
    tokenizer_file = work / "tokenizer.json"
    stream = training_stream(_tokenizer(tokenizer_file))
    target = train.train_target(
        stream, target_recipe, work / "target", report("target"), resume=resume
    )
    pool = _pool(target.eval(), stream, work / "pool.pt", report("target's own text"))
    draft = train.train_draft(
        target, stream, draft_recipe, work / "draft", report("draft"), resume, pool
    )
    for name, model, recipe, shape in (
        ("target", target, target_recipe, train.TARGET),
        ("draft", draft, draft_recipe, train.DRAFT),
    ):
        train.write_model(model, tokenizer_file, out / name)
        train.write_log(
            out,
            name,
            recipe,
            shape,
            training_tokens=len(stream),
            parameters=sum(p.numel() for p in model.parameters()),
        )
