"""Byte-level tokenizers trained on the spot."""

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers


def train_byte_level(
    texts: Iterable[str],
    size: int,
    control: Sequence[str],
    cut: pre_tokenizers.PreTokenizer | None = None,
) -> Tokenizer:
    """A byte-level BPE.

    Args:
        texts: what it learns from.
        size: number of tokens, control tokens included.
        control: control tokens, which get the first ids.
        cut: how text is cut before it is merged; GPT-2's way where None.
    """
    tokenizer = Tokenizer(models.BPE())
    if cut is None:
        cut = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = cut
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(control),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
