"""What trackers wrote, read back by their own readers: scalars by stage, tag and step."""

import json
import os
import struct
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

Series = dict[str, dict[int, float]]


def tensorboard_scalars(logs: Path, stage: str) -> Series:
    """The event files of one stage; no step comes twice."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(logs / "tensorboard" / stage))
    events.Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        seen = [(event.step, event.value) for event in events.Scalars(tag)]
        assert len(seen) == len(dict(seen))
        found[tag] = dict(seen)
    return found


def _wandb_records(file: Path) -> Iterator[bytes]:
    """What wandb logged: a LevelDB log (blocks of 32 KB; crc, size, kind) behind seven bytes."""
    content, place, whole = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        size, kind = struct.unpack_from("<HB", content, place + 4)
        whole += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            yield whole
            whole = b""


def wandb_scalars(logs: Path) -> tuple[dict[str, Series], dict[str, set[tuple[str, str]]]]:
    """Offline runs under their display names; and each one's ids, with the group's name."""
    from wandb.proto.wandb_internal_pb2 import Record

    found: dict[str, Series] = defaultdict(lambda: defaultdict(dict))
    identities: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for file in sorted(logs.glob("wandb/offline-run-*/*.wandb")):
        name = ""
        for record in map(Record.FromString, _wandb_records(file)):
            if record.HasField("run"):
                name = record.run.display_name
                identities[name].add((record.run.run_id, record.run.run_group))
            if record.HasField("history"):
                values = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
                step = values["_step"]
                for tag, value in values.items():
                    if not tag.startswith("_"):
                        assert step not in found[name][tag]
                        found[name][tag][step] = value
    return found, identities


# Where trackio keeps its files is fixed when it is imported: so it is asked in a process.
_TRACKIO = """
import json, sys, trackio
from trackio.sqlite_storage import SQLiteStorage
project = sys.argv[1]
runs = {run.name: SQLiteStorage.get_logs(project, run.name) for run in trackio.Api().runs(project)}
print(json.dumps(runs, default=str))
"""


def trackio_scalars(folder: Path, project: str) -> dict[str, Series]:
    """Runs by name out of ``$TRACKIO_DIR``."""
    done = subprocess.run(
        [sys.executable, "-c", _TRACKIO, project],
        env={**os.environ, "TRACKIO_DIR": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Series] = {}
    for name, rows in json.loads(done.stdout.splitlines()[-1]).items():
        series: Series = defaultdict(dict)
        for row in rows:
            for tag, value in row.items():
                if isinstance(value, int | float) and tag != "step":
                    assert row["step"] not in series[tag]
                    series[tag][row["step"]] = value
        found[name] = series
    return found
