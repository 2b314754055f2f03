"""Near-duplicates by ROUGE-L: an index over every text kept so far, exact and fast.

Two texts are near-duplicates when their ROUGE-L F1 is above a threshold (0.7 in Self-Instruct and
in Montessori-Instruct). The score, its tokenizer and its rounding are those of the ``rouge-score``
package with ``use_stemmer=False``; the index prunes with bounds and so never changes a decision.

Write m and n for the token counts of two texts and L for their longest common subsequence. F1 is
``2 L / (m + n)``, and L is at most the number of tokens that the two texts share (as multisets).
So the F1 threshold turns into a least L for each pair of lengths, and a text that shares fewer
tokens with the candidate needs no alignment. Inverted lists count the shared tokens of all kept
texts in one ``bincount``; only the few survivors are aligned, by rapidfuzz's C++ code.
"""

import re
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from rapidfuzz.distance import LCSseq

from montessori_jax.errors import UserError

_TOKEN = re.compile(r"[a-z0-9]+")


def tokenize(text: str) -> list[str]:
    """Lower-cases ``text`` and returns its runs of ASCII letters and digits, in order.

    Equal to the default tokenizer of ``rouge-score`` without stemming: every other character,
    accented letters and other scripts included, only separates tokens.
    """
    return _TOKEN.findall(text.lower())


def f1(common: int, m: int, n: int) -> float:
    """ROUGE-L F1 of two texts of ``m`` and ``n`` tokens with a common subsequence of ``common``.

    ``2 p r / (p + r)`` with ``p = common / m`` and ``r = common / n``, in this order of float64
    operations, which is the one of ``rouge-score``: a pair exactly at the threshold falls on the
    same side. Zero when either text has no token or nothing is shared.
    """
    if common == 0:
        return 0.0
    precision = common / m
    recall = common / n
    return 2 * precision * recall / (precision + recall)


def rouge_l(a: str, b: str) -> float:
    """ROUGE-L F1 of two texts, in [0, 1]; symmetric; 0 when either has no token."""
    left, right = tokenize(a), tokenize(b)
    return f1(LCSseq.similarity(left, right), len(left), len(right))


@dataclass(frozen=True)
class Match:
    """The kept text closest to a candidate: its place in the index, itself, its ROUGE-L F1."""

    index: int
    text: str
    score: float


class NearDuplicateIndex:
    """Finds the kept text most like a candidate, if any is above the threshold.

    Rebuild it after an interruption by passing the same texts in the same order.

    Args:
        texts: texts to start from, as if added one by one.
        threshold: ROUGE-L F1 in [0, 1]; a text is a near-duplicate strictly above it, so that 1
            matches nothing.

    Raises:
        UserError: the threshold lies outside [0, 1].
    """

    def __init__(self, texts: Iterable[str] = (), *, threshold: float = 0.7) -> None:
        if not 0.0 <= threshold <= 1.0:
            raise UserError(f"the ROUGE-L threshold is {threshold}; it must lie between 0 and 1")
        self.threshold = threshold
        self._texts: list[str] = []
        self._sequences: list[tuple[int, ...]] = []
        self._lengths = array("q")
        self._vocabulary: dict[str, int] = {}
        # (token, k) -> the kept texts in which the token occurs at least k + 1 times. One entry an
        # occurrence makes the overlap of two multisets a plain count of shared entries.
        self._postings: dict[tuple[int, int], array[int]] = {}
        for text in texts:
            self.add(text)

    def __len__(self) -> int:
        return len(self._texts)

    @property
    def texts(self) -> tuple[str, ...]:
        """Every text added, in order."""
        return tuple(self._texts)

    def add(self, text: str) -> int:
        """Adds ``text`` and returns its index. Duplicates may be added; nothing is checked."""
        index = len(self._texts)
        vocabulary = self._vocabulary
        sequence = tuple(vocabulary.setdefault(t, len(vocabulary)) for t in tokenize(text))
        for key in _occurrences(sequence):
            self._postings.setdefault(key, array("q")).append(index)
        self._texts.append(text)
        self._sequences.append(sequence)
        self._lengths.append(len(sequence))
        return index

    def query(self, text: str) -> Match | None:
        """The kept text with the highest score above the threshold, the earliest of equals.

        None when no kept text scores above the threshold. The candidate is not added.
        """
        # A word that no kept text has gets an id that no kept text has.
        unknown = len(self._vocabulary)
        sequence = tuple(self._vocabulary.get(t, unknown) for t in tokenize(text))
        if not sequence or not self._texts:
            return None

        lists = [self._postings[k] for k in _occurrences(sequence) if k in self._postings]
        if not lists:
            return None
        # The views borrow the arrays' memory: concatenate copies it, and they end with this line.
        entries = np.concatenate([np.frombuffer(entry, np.int64) for entry in lists])
        shared = np.bincount(entries, minlength=len(self._texts))
        lengths = np.array(self._lengths, np.int64)
        needed = _needed(len(sequence), int(lengths.max()), self.threshold)[lengths]

        best: Match | None = None
        for index in np.flatnonzero(shared >= needed).tolist():
            kept = self._sequences[index]
            common = LCSseq.similarity(sequence, kept)
            score = f1(common, len(kept), len(sequence))
            if score > self.threshold and (best is None or score > best.score):
                best = Match(index, self._texts[index], score)
        return best


def _occurrences(sequence: tuple[int, ...]) -> list[tuple[int, int]]:
    """(token, how often it came before) for each token of the sequence."""
    seen: dict[int, int] = {}
    keys = []
    for token in sequence:
        count = seen.get(token, 0)
        keys.append((token, count))
        seen[token] = count + 1
    return keys


def _needed(m: int, longest: int, threshold: float) -> np.ndarray:
    """For n = 0..longest, the least common count that can exceed the threshold against m tokens.

    int64 [longest + 1]. One below the algebraic bound ``threshold (m + n) / 2``, so that rounding
    cannot prune a pair whose float score is above the threshold, and at least 1.
    """
    bound = np.floor(threshold * (m + np.arange(longest + 1)) / 2).astype(np.int64)
    return np.maximum(bound, 1)
