"""A stage in a process of its own: the same bytes, its errors ours, and its end with our end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from montessori_jax.errors import Interrupted, UserError
from montessori_jax.stage_process import in_own_process
from montessori_jax.stopping import Stop
from tests.end_to_end.artifacts import artifacts, assert_same_students
from tests.end_to_end.resume_test import CONFIG, ROOT
from tests.tiny_world import write_tiny_teacher


def body(what: str, place: str, stop: Stop) -> None:
    """What a stage's process does in these tests."""
    Path(place).write_text(f"{os.getpid()} {os.environ.get('SHARE')}")
    if what == "user":
        raise UserError("say so")
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "broken":
        raise RuntimeError("unforeseen")
    if what == "waits":
        while True:
            time.sleep(0.02)
            stop.check()


def run(what: str, place: Path, stop: Stop | None = None) -> None:
    in_own_process(body, (what, str(place)), stop=stop or Stop(), environment={"SHARE": "0.5"})


def test_it_is_another_process_with_variables_of_its_own(tmp_path):
    run("nothing", tmp_path / "said")
    pid, share = (tmp_path / "said").read_text().split()
    assert int(pid) != os.getpid()
    assert share == "0.5"
    assert "SHARE" not in os.environ


@pytest.mark.parametrize(
    ("what", "message"),
    [("user", "^say so$"), ("killed", "was killed, as a system that runs out of memory"),
     ("broken", "ended with status 1")],
)  # fmt: skip
def test_how_it_failed_is_said(what, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run(what, tmp_path / "said")


def test_a_stop_is_passed_on(tmp_path):
    class Later(Stop):
        def requested(self) -> bool:
            if (tmp_path / "said").exists():
                self.signal = signal.SIGTERM
            return super().requested()

    with pytest.raises(Interrupted):
        run("waits", tmp_path / "said", Later())


def test_a_stop_before_it_listens_is_a_stop_as_well(tmp_path):
    stop = Stop()
    stop.signal = signal.SIGTERM
    with pytest.raises(Interrupted):
        run("waits", tmp_path / "said", stop)


def test_it_ends_with_its_parent(tmp_path):
    place = tmp_path / "said"
    parent = subprocess.Popen(
        [sys.executable, "-c",
         "from pathlib import Path\nfrom tests.stage_process_test import run\n"
         f"if __name__ == '__main__': run('waits', Path({str(place)!r}))"],
        cwd=ROOT,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not place.exists() or not place.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child = int(place.read_text().split()[0])
    parent.kill()
    parent.wait()
    while Path(f"/proc/{child}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_run_of_such_stages_makes_the_same_bytes(tmp_path):
    teacher = write_tiny_teacher(tmp_path / "teacher")
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump({**CONFIG, "teacher": str(teacher), "student": str(teacher)}))
    environment = {
        **os.environ,
        "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    for name in ("never", "always"):
        done = subprocess.run(
            [sys.executable, "-m", "montessori_jax.cli", "run", config,
             f"run_dir={tmp_path / name}", f"stage_processes={name}"],
            cwd=ROOT, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    never, always = (artifacts(tmp_path / name) for name in ("never", "always"))
    for files in (never, always):
        del files["config.yaml"]  # they differ in one setting
    assert never == always
    assert_same_students(tmp_path / "never", tmp_path / "always")
