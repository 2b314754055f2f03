"""The loader's bound on memory, on 150 MB in 16 MB shards: the benchmark's small form."""

import json
from pathlib import Path

import pytest

from benchmarks.loading import LLAMA_3_8B, in_child, same_tensors, write_checkpoint

# Half of the bytes are in three of the twelve stacked parameters, each far larger than a shard.
SMALL = LLAMA_3_8B | {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_peaks_stay_under_what_is_kept_and_1_3_of_the_largest_shard(tmp_path: Path):
    folder = tmp_path / "checkpoint"
    write_checkpoint(folder, SMALL, shard_bytes=16_000_000)
    sizes = [file.stat().st_size for file in folder.glob("*.safetensors")]
    assert len(sizes) > 8
    room = 1.3 * max(sizes)

    found = in_child("ours", folder)

    assert found["kept_bytes"] == pytest.approx(sum(sizes), rel=0.001)
    assert found["load"]["peak_bytes"] < found["kept_bytes"] + room, json.dumps(found)
    assert found["load"]["anonymous_bytes"] < found["kept_bytes"] + room
    assert found["load"]["anonymous_bytes"] > 0.9 * found["kept_bytes"]  # it does measure
    assert found["export"]["peak_bytes"] < room
    assert same_tensors(folder, folder / "export")
