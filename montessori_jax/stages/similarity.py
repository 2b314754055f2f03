"""Stage: how much the tuned teacher's text differs from the untuned one's under equal seeds."""

import json
from pathlib import Path
from typing import Any

from rapidfuzz.distance import Levenshtein

from montessori_jax.work import Work


def _texts(folder: Path) -> dict[tuple[str, int], str]:
    lines = (folder / "instructions.jsonl").read_text(encoding="utf-8").splitlines()[1:]
    records = [one for line in lines for one in json.loads(line)["completions"]]
    return {(one["prompt_id"], one["index"]): one["text"] for one in records}


def _prompts(folder: Path) -> dict[str, Any]:
    lines = (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["prompt_id"]: row for row in map(json.loads, lines)}


def compare_texts(untuned: str, tuned: str, work: Work) -> dict[str, Any]:
    """Compare what two teachers wrote for the same prompt, sample and seed.

    Only prompts that both were asked in the same words count: later rounds may show a teacher's
    own instructions. ``changed_share`` is the share of texts that differ at all, ``edit_distance``
    their mean Levenshtein distance in characters over the longer text, 0 (same) to 1.
    """
    before, after = Path(untuned), Path(tuned)
    asked, asked_again = _prompts(before), _prompts(after)
    same = {name for name in asked if asked_again.get(name) == asked[name]}
    left, right = _texts(before), _texts(after)
    shared = [key for key in left if key in right and key[0] in same]
    distances = [Levenshtein.normalized_distance(left[key], right[key]) for key in shared]
    count = len(distances)
    return {
        "compared": count,
        "prompts_compared": len(same),
        "changed_share": sum(d > 0 for d in distances) / count if count else 0.0,
        "edit_distance": sum(distances) / count if count else 0.0,
    }
