"""Milliseconds a near-duplicate check takes with many instructions kept.

    python -m benchmarks.dedupe [--kept 50000] [--texts FILE.jsonl ...]

Two sets of text: random words with Zipf's frequencies, and, where JSONL files with an
``instruction`` column are given, real instructions recombined (the head of one sentence with the
tail of another). The set of kept texts is grown as a run grows it, by what passes the check.
Candidates are half new and half near-copies of kept texts. ``rouge-score`` scores the same
candidates against a slice of the kept texts in the same run; its time for all of them is that
time scaled up, and its decisions on the slice have to be the index's.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rouge_score.rouge_scorer import RougeScorer

from benchmarks.record import write_result
from montessori_jax.generation.dedupe import NearDuplicateIndex

Maker = Callable[[random.Random], str]


def zipf_maker(vocabulary: int = 30_000) -> Maker:
    """Texts of 4 to 40 words, mostly short, drawn with frequency 1 / (rank + 2)."""
    words = [f"w{rank}" for rank in range(vocabulary)]
    cumulative, total = [], 0.0
    for rank in range(vocabulary):
        total += 1 / (rank + 2)
        cumulative.append(total)

    def make(rng: random.Random) -> str:
        length = min(40, max(4, round(rng.lognormvariate(2.6, 0.5))))
        return " ".join(rng.choices(words, cum_weights=cumulative, k=length))

    return make


def recombining_maker(files: list[Path]) -> Maker:
    """The head of one instruction and the tail of another, both cut at a random word."""
    instructions = []
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            words = json.loads(line)["instruction"].split()
            if 4 <= len(words) <= 60:
                instructions.append(words)

    def make(rng: random.Random) -> str:
        head, tail = rng.choice(instructions), rng.choice(instructions)
        return " ".join(head[: rng.randint(2, len(head))] + tail[rng.randrange(len(tail) - 1) :])

    return make


def near_copy(text: str, rng: random.Random) -> str:
    """The text with a tenth of its words, at least one, doubled or dropped."""
    words = text.split()
    for _ in range(max(1, len(words) // 10)):
        place = rng.randrange(len(words))
        words[place : place + 1] = rng.choice(([], [words[place]] * 2))
    return " ".join(words)


def measure(make: Maker, kept: int, candidates: int, slice_size: int, seed: int) -> dict[str, Any]:
    """Grows an index to ``kept`` texts, then times it and rouge-score on the same candidates."""
    rng = random.Random(seed)
    index = NearDuplicateIndex()
    start, offered = time.perf_counter(), 0
    while len(index) < kept:
        text = make(rng)
        offered += 1
        if index.query(text) is None:
            index.add(text)
    growing = time.perf_counter() - start
    texts = index.texts
    start = time.perf_counter()
    index = NearDuplicateIndex(texts)
    rebuilding = time.perf_counter() - start

    asked = [make(rng) for _ in range(candidates // 2)]
    asked += [near_copy(rng.choice(texts), rng) for _ in range(candidates - len(asked))]
    seconds, matches = [], 0
    for text in asked:
        start = time.perf_counter()
        match = index.query(text)
        seconds.append(time.perf_counter() - start)
        matches += match is not None

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    brute_seconds, disagreements, compared = [], 0, 0
    for text in rng.sample(asked, 10):
        part = rng.sample(texts, slice_size - 1)
        best = index.query(text)
        part.append(best.text if best else texts[0])
        start = time.perf_counter()
        scores = [scorer.score(other, text)["rougeL"].fmeasure for other in part]
        brute_seconds.append((time.perf_counter() - start) / slice_size * kept)
        found = NearDuplicateIndex(part).query(text)
        expected = max(scores) if max(scores) > 0.7 else None
        disagreements += (found.score if found else None) != expected
        compared += len(part)

    median = statistics.median(seconds)
    return {
        "kept": kept,
        "words_median": statistics.median(len(text.split()) for text in texts),
        "offered_to_reach_kept": offered,
        "grow_seconds": round(growing, 1),
        "rebuild_seconds": round(rebuilding, 2),
        "candidates": len(asked),
        "near_duplicates_found": matches,
        "ms_median": round(1e3 * median, 3),
        "ms_p99": round(1e3 * float(np.percentile(seconds, 99)), 3),
        "ms_max": round(1e3 * max(seconds), 3),
        "rouge_score_pairs_timed": compared,
        "rouge_score_ms_scaled_to_kept": round(1e3 * statistics.median(brute_seconds), 1),
        "times_faster": round(statistics.median(brute_seconds) / median),
        "disagreements_with_rouge_score": disagreements,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="time of a near-duplicate check")
    parser.add_argument("--kept", type=int, default=50_000, help="texts in the index")
    parser.add_argument("--candidates", type=int, default=2_000, help="checks timed")
    parser.add_argument("--slice", type=int, default=500, help="kept texts scored by rouge-score")
    parser.add_argument("--texts", type=Path, nargs="+", default=[], help="JSONL with instruction")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    makers = {"zipf": zipf_maker()}
    if options.texts:
        makers["recombined"] = recombining_maker(options.texts)
    payload = {}
    for name, make in makers.items():
        payload[name] = measure(make, options.kept, options.candidates, options.slice, options.seed)
        print(name, json.dumps(payload[name]), flush=True)
    print(write_result("dedupe", payload))


if __name__ == "__main__":
    main()
