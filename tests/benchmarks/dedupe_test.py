"""A small form of the near-duplicate benchmark: it runs, and rouge-score agrees with the index."""

import json
import random
from pathlib import Path

from benchmarks import dedupe


def test_small_benchmark_agrees_with_rouge_score() -> None:
    result = dedupe.measure(
        dedupe.zipf_maker(vocabulary=300), kept=300, candidates=40, slice_size=30, seed=0
    )
    assert result["kept"] == 300
    assert result["candidates"] == 40
    assert result["rouge_score_pairs_timed"] == 300
    assert result["disagreements_with_rouge_score"] == 0
    # The near-copies, half of the candidates, are nearly all found; short ones may change more.
    assert 15 <= result["near_duplicates_found"] <= 25
    assert 0 < result["ms_median"] <= result["ms_p99"] <= result["ms_max"]


def test_recombined_texts_join_two_instructions(tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    rows = ["one two three four five", "six seven eight nine ten", "too short"]
    file.write_text(
        "".join(json.dumps({"instruction": row}) + "\n" for row in rows), encoding="utf-8"
    )
    make = dedupe.recombining_maker([file])
    rng = random.Random(0)
    texts = {make(rng) for _ in range(200)}
    assert "one two nine ten" in texts
    assert not any("short" in text for text in texts)
    assert all(text.split()[0] in ("one", "six") for text in texts)
