"""Byte-level BPE tokenizer of the reference pair."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from wispprof.profiling.prompts import SourceFile

BOS, EOS = "<|bos|>", "<|eos|>"


def train_tokenizer(files: list[SourceFile], vocab_size: int = 4096) -> Tokenizer:
    """Byte-level BPE over the training files; id 0 is BOS, id 1 is EOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((f.text for f in files), trainer, length=len(files))
    return tokenizer


def encode(tokenizer: Tokenizer, files: list[SourceFile]) -> list[list[int]]:
    """Token ids of each file, BOS first and EOS last."""
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    return [[bos, *e.ids, eos] for e in tokenizer.encode_batch([f.text for f in files])]
