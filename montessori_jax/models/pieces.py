"""Sentencepiece's byte-pair tokenizers from their pieces and scores, which is all that GGUF keeps.

Sentencepiece joins the two neighbours whose joint piece has the highest score, after it has cut out
user-defined pieces; `tokenizers` wants the joints in order instead.
"""

from collections.abc import Sequence

from gguf import TokenType
from tokenizers import Tokenizer, decoders, models, normalizers

SPACE = "\u2581"  # how pieces write a space


def tokenizer_of_pieces(
    pieces: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    *,
    unknown: int | None,
    space_prefix: bool,
) -> Tokenizer:
    """A `Tokenizer` with the ids of sentencepiece's own BPE; control and user-defined pieces are
    left for the caller to add.

    Args:
        pieces: the vocabulary in order, spaces as `SPACE`.
        scores: of each piece; higher ones are joined first.
        types: `gguf.TokenType` of each piece; only normal ones are joined.
        unknown: id of the unknown piece, for what not even byte pieces can say.
        space_prefix: whether text is read as if a space stood before it (Llama 2 does so, Gemma
            does not).
    """
    normal = {piece for piece, kind in zip(pieces, types, strict=True) if kind == TokenType.NORMAL}
    ids = {piece: index for index, piece in enumerate(pieces)}
    merges = []
    for piece in sorted(normal, key=lambda piece: (-scores[ids[piece]], ids[piece])):
        halves = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        merges += [pair for pair in halves if pair[0] in normal and pair[1] in normal]
    backend = Tokenizer(
        models.BPE(
            vocab=ids,
            merges=merges,
            unk_token=None if unknown is None else pieces[unknown],
            fuse_unk=True,
            byte_fallback=TokenType.BYTE in types,
        )
    )
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE)]
    texts: list[decoders.Decoder] = [
        decoders.Replace(SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if space_prefix:
        spaces.insert(0, normalizers.Prepend(SPACE))
        texts.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = normalizers.Sequence(spaces)
    backend.decoder = decoders.Sequence(texts)
    return backend
