"""What the compiler found of programs before, on disk: `benchmarks.plans` goes on where it was."""

import json
from dataclasses import asdict
from pathlib import Path

from montessori_jax.plan.analysis import Found
from montessori_jax.plan.hlo import Collective


class Known(dict[str, Found]):
    """A file of JSON lines, one for each program; a line cut short by a kill is left out.

    Args:
        path: the file; its name should have the compiler's version, which is in no key.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            talks = [one | {"axes": tuple(one["axes"])} for one in record["collectives"]]
            record["collectives"] = tuple(Collective(**one) for one in talks)
            record["sizes"] = tuple(record["sizes"]) if record["sizes"] else None
            super().__setitem__(record.pop("key"), Found(**record))

    def __setitem__(self, key: str, found: Found) -> None:
        super().__setitem__(key, found)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps({"key": key, **asdict(found)}))
