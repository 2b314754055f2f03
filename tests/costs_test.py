import json

from montessori_jax.costs import Meter, describe_cost, read_ledger


def test_attempts_of_a_stage_are_summed_and_peaks_are_not(tmp_path):
    ledger = tmp_path / "costs.jsonl"
    rows = [
        {"stage": "a", "finished": False, "seconds": 1.5, "t_tokens": 3, "peak_memory_bytes": 9},
        {"stage": "b", "finished": True, "seconds": 2.0, "peak_memory_bytes": 1},
        {"stage": "a", "finished": True, "seconds": 0.5, "t_tokens": 4, "peak_memory_bytes": 7},
    ]
    ledger.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"stage": "a", "sec')
    a, b = read_ledger(ledger)
    assert (a["attempts"], a["seconds"], a["t_tokens"], a["peak_memory_bytes"]) == (2, 2.0, 7, 9)
    assert (b["attempts"], b["seconds"]) == (1, 2.0)


def test_a_meter_counts_by_kind_and_writes_one_row(tmp_path):
    ledger = tmp_path / "costs.jsonl"
    meter = Meter(ledger, "generate")
    meter.count(prompt_tokens=5, generated_tokens=7, flops=10.0)
    meter.count(generated_tokens=3)
    row = meter.close(finished=False)
    assert (row["prompt_tokens"], row["generated_tokens"], row["flops"]) == (5, 10, 10.0)
    assert row["peak_memory_bytes"] > 1e6
    assert json.loads(ledger.read_text()) == row
    assert "10 generated tokens" in describe_cost(row)


def test_no_ledger_no_rows(tmp_path):
    assert read_ledger(tmp_path / "absent.jsonl") == []
