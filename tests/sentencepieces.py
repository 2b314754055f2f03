"""Sentencepiece models trained on the spot."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece


def train_sentencepiece(folder: Path, texts: Iterable[str], **options: Any) -> Path:
    """A BPE of 900 pieces with bytes for what it lacks, white space as it stands.

    Written to ``folder/tokenizer.model``, which is returned; ``options`` are sentencepiece's own.
    """
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(texts).split("\n")),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=900,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **options,
    )
    return folder / "tokenizer.model"
