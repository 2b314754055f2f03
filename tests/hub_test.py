"""Pushing through huggingface_hub itself to a server that speaks the hub's interface."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from montessori_jax.errors import UserError
from montessori_jax.hub import check_hub
from tests.fake_hub import FakeHub, fake_hub

# The client reads its address when it is imported, so each run is a process; the loop's own stages
# are stood in for by two that write a data set and a model.
SCRIPT = """
import sys
from pathlib import Path
from montessori_jax.config import RunConfig
from montessori_jax.data.writing import DatasetCard, write_dataset_card
from montessori_jax.hub import check_hub
from montessori_jax.loop import Loop
from montessori_jax.runs import RunDirectory
from montessori_jax.stopping import Stop

config = RunConfig(run_dir=sys.argv[1], push_to_hub="org/mine")
check_hub(config.push_to_hub)
loop = Loop(config, RunDirectory.create(config, {}), 1, "teacher", Stop(), print, True)

def generate(work):
    card = DatasetCard("Rows", "Of a test.", {"id": "a name"}, ("by hand",))
    write_dataset_card(work.folder, [{"id": "a"}, {"id": "b"}], card)
    work.file("journal.jsonl").write_text("not to be pushed")
    return {"rows": 2}

def train(work):
    student = work.file("student")
    student.mkdir(exist_ok=True)
    for name, text in {"README.md": "# A model", "config.json": "{}", "weights": "w"}.items():
        (student / name).write_text(text)
    return {"rows": 2}

for name, body in (("generate", generate), ("train-tuned", train)):
    loop.stage(name, body, lambda result: f"{result['rows']} rows")
print("the loop ended")
"""
DATA, MODEL = (
    "dataset/org/mine-iteration-1-generate",
    "model/org/mine-iteration-1-train-tuned-student",
)


def run_loop(folder: Path, hub: FakeHub, **changes: str) -> list[str]:
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.address,
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "hf_secret",
        "HF_HOME": str(folder.parent / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONWARNINGS": "ignore",
        **changes,
    }
    command = [sys.executable, "-c", SCRIPT, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "the loop ended"
    return lines


def test_a_failed_push_loses_nothing_and_the_next_run_makes_up_for_it(tmp_path: Path):
    folder = tmp_path / "run"
    with fake_hub() as hub:
        hub.broken = 403
        lines = run_loop(folder, hub)
        warnings = [line for line in lines if line.startswith("warning: ")]
        assert len(warnings) == 2
        assert "could not be pushed to org/mine-iteration-1-generate" in warnings[0]
        assert "the next 'montessori run' tries again" in warnings[0]
        assert all((folder / "iteration-1" / name / "done.json").exists()
                   for name in ("generate", "train-tuned"))  # fmt: skip

        hub.broken = 0
        lines = run_loop(folder, hub)
        assert not [line for line in lines if line.startswith("warning")]
        assert any("done before: 2 rows" in line for line in lines)
        assert f"iteration-1/generate: pushed to {hub.address}/datasets/org/mine-" in "\n".join(
            lines
        )
        assert hub.repositories.keys() == {DATA, MODEL}
        assert {kept["visibility"] for kept in hub.repositories.values()} == {"private"}
        assert hub.tokens == {"Bearer hf_secret"}
        assert hub.repositories[MODEL]["files"].keys() == {"README.md", "config.json", "weights"}
        files = hub.repositories[DATA]["files"]
        assert files.keys() == {"README.md", "data.parquet"}
        (tmp_path / "pulled.parquet").write_bytes(files["data.parquet"])
        assert pq.read_table(tmp_path / "pulled.parquet").to_pylist() == [{"id": "a"}, {"id": "b"}]
        assert b"configs:" in files["README.md"]

        hub.requests.clear()
        run_loop(folder, hub)
        assert hub.requests == []  # what is there is not sent again
    pushed = json.loads((folder / "iteration-1" / "generate" / "pushed.json").read_text())
    assert pushed.keys() == {DATA.removeprefix("dataset/")}


def test_the_hub_out_of_reach_is_one_line(tmp_path: Path):
    with fake_hub() as hub:
        pass  # the port is closed again
    lines = run_loop(tmp_path / "run", hub, HF_HUB_OFFLINE="1")
    assert sum(line.startswith("warning: ") for line in lines) == 2


@pytest.mark.parametrize("prefix", ["mine", "a/b/c", "/x", "org/", "org/sp ace"])
def test_a_prefix_that_is_none_is_refused_before_any_work(prefix: str, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(UserError, match="expected org/prefix"):
        check_hub(prefix)


def test_no_account_is_told_before_any_work(monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UserError, match="hf auth login"):
        check_hub("org/mine")
    check_hub("")
