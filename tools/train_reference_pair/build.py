"""Build the reference pair: corpus, tokenizer, target, the target's logits, draft.

Each part is stored in a work folder, so an interrupted build resumes where it stopped.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaForCausalLM

from tools.train_reference_pair import distil, train
from tools.train_reference_pair.tokenizer import encode, train_tokenizer
from wispprof.profiling.prompts import collect_sources

TARGET_RECIPE = train.Recipe(steps=1300, decay_share=0.25)
DRAFT_RECIPE = train.Recipe(steps=1800, decay_share=0.4, short=(8, 512), long=(4, 1024))
OWN_BATCHES, OWN_ROWS = 12, 96
"""Calls of the target writing its own text, and texts of each."""
FILE_ROWS = 768
"""Crops of training files that the draft learns from, of ``DRAFT_RECIPE.long`` tokens each."""

Reporter = Callable[[str], train.Progress]
"""Given the name of a part ("target", "draft", …), returns its progress callback."""


def training_stream(tokenizer: Tokenizer) -> Tensor:
    """All training files as one 1-D stream of token ids, in a fixed order."""
    files, _ = collect_sources()
    return torch.tensor([t for ids in encode(tokenizer, files) for t in ids])


def _tokenizer(file: Path) -> Tokenizer:
    if not file.exists():
        files, _ = collect_sources()
        file.parent.mkdir(parents=True, exist_ok=True)
        train_tokenizer(files).save(str(file))
    return Tokenizer.from_file(str(file))


def _own_text_logits(
    target: LlamaForCausalLM, stream: Tensor, recipe: train.Recipe, work: Path, report: Reporter
) -> distil.TeacherLogits:
    file = work / "own-text-logits.pt"
    if not file.exists():
        rows, length = recipe.short
        progress, texts = report("target's own text"), []
        for i in range(OWN_BATCHES):
            texts.append(distil.write_text(target, stream, OWN_ROWS, length, seed=11 + i))
            progress(i + 1, OWN_BATCHES, float("nan"), float("nan"))
        distil.save_logits(
            distil.query_teacher(target, torch.cat(texts), rows, report("target on its own text")),
            file,
        )
    return distil.load_logits(file)


def _file_logits(
    target: LlamaForCausalLM, stream: Tensor, recipe: train.Recipe, work: Path, report: Reporter
) -> distil.TeacherLogits:
    file = work / "file-logits.pt"
    if not file.exists():
        rows, length = recipe.long
        crops = train.Sampler(stream, recipe.seed + 2).batch(0, (FILE_ROWS, length))[:, :-1]
        distil.save_logits(
            distil.query_teacher(target, crops, rows, report("target on training files")), file
        )
    return distil.load_logits(file)


def build_target(out: Path, work: Path, report: Reporter, recipe: train.Recipe) -> None:
    """Train the target and write it to ``out/target``."""
    tokenizer_file = work / "tokenizer.json"
    stream = training_stream(_tokenizer(tokenizer_file))
    target = train.train_target(stream, recipe, work / "target", report("target"), resume=True)
    train.write_model(target, tokenizer_file, out / "target")
    train.write_log(out, "target", recipe, train.TARGET, target, len(stream))


def build_draft(out: Path, work: Path, report: Reporter, recipe: train.Recipe) -> None:
    """Distil a draft from the model in ``out/target``, as it is stored, and write it to ``out/draft``."""
    tokenizer_file = out / "target" / "tokenizer.json"
    stream = training_stream(Tokenizer.from_file(str(tokenizer_file)))
    target = LlamaForCausalLM.from_pretrained(out / "target", dtype=torch.float32)
    target.eval().requires_grad_(False)
    own = _own_text_logits(target, stream, recipe, work, report)
    files = _file_logits(target, stream, recipe, work, report)
    draft = distil.train_draft(target, own, files, recipe, work / "draft", report("draft"), resume=True)
    train.write_model(draft, tokenizer_file, out / "draft")
    train.write_log(out, "draft", recipe, distil.DRAFT, draft, own.tokens.numel() + files.tokens.numel())


def build_pair(
    out: Path,
    work: Path,
    report: Reporter,
    target_recipe: train.Recipe = TARGET_RECIPE,
    draft_recipe: train.Recipe = DRAFT_RECIPE,
    resume: bool = True,
    keep_target: bool = False,
) -> None:
    """Train both models and write ``out/target`` and ``out/draft`` as Hugging Face folders.

    ``work`` holds the tokenizer, checkpoints and teacher logits; with ``resume`` an
    interrupted build continues from there. With ``keep_target`` only the draft is made, for the model that
    ``out/target`` already holds.
    """
    if not resume:
        shutil.rmtree(work, ignore_errors=True)
    if not keep_target:
        build_target(out, work, report, target_recipe)
    build_draft(out, work, report, draft_recipe)
