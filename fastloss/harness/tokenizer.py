"""A byte-level BPE: any text goes in and the same text comes out."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

END = "<|endoftext|>"  # between documents; id 0
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")  # before a message; text never holds them
PAD = "<|pad|>"  # apart from END, so that a padded batch still shows where its texts end


def train_bpe(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """At most ``vocab_size`` tokens: a small corpus may run out of pairs to merge before that."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(
                individual_digits=True
            ),  # a digit is a token: else 12+3 has nothing of 1 or 2
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, *ROLES, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def load(path: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()  # some are published with a length
    tokenizer.no_padding()
    return tokenizer


def end_id(tokenizer: Tokenizer) -> int | None:
    """The id that ends a document: ours, or the usual names in a tokenizer from elsewhere."""
    for name in (END, "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>"):
        if (id := tokenizer.token_to_id(name)) is not None:
            return int(id)
    return None


def encode(tokenizer: Tokenizer, documents: list[str], end: int | None = None) -> Tensor:
    """All documents as one stream of ids: each begun as the tokenizer begins a text (BOS, or nothing), and followed by
    ``end``, or what by its name is an end token.  # [tokens] int32"""
    tokenizer.encode_special_tokens = True  # the end token's name, written in a text, is text
    end = end_id(tokenizer) if end is None else end
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(documents):
        ids += encoding.ids
        if end is not None and encoding.ids[-1:] != [end]:  # some add it themselves
            ids.append(end)
    return torch.tensor(ids, dtype=torch.int32, device="cpu")
