"""What is handed to a cluster: JobSets, the SkyPilot task, xpk's workload and the image."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from montessori_jax import cluster
from montessori_jax.config_file import load_run_config
from montessori_jax.errors import LostProcess, UserError
from tests.launch.started import LAUNCH, environment, has_started, wait_until

JOBSETS = ("jobset.yaml", "jobset_tpu.yaml")
# How processes find each other: the first three, or JAX's own detection.
NAMES = {
    "MONTESSORI_COORDINATOR", "MONTESSORI_PROCESSES", "MONTESSORI_PROCESS", "MONTESSORI_CLUSTER",
}  # fmt: skip


def loads(arguments: list[str]) -> None:
    """``montessori`` would take them: the config is there and each setting exists."""
    assert arguments[0] == "run"
    load_run_config(LAUNCH.parent / arguments[1], arguments[2:])


class Manifest:
    """A JobSet of one job, taken apart."""

    def __init__(self, name: str) -> None:
        self.whole: dict[str, Any] = yaml.safe_load((LAUNCH / name).read_text())
        [self.replicated] = self.whole["spec"]["replicatedJobs"]
        self.job = self.replicated["template"]["spec"]
        self.pod = self.job["template"]["spec"]
        [self.container] = self.pod["containers"]
        self.environment = {one["name"]: one for one in self.container["env"]}


@pytest.mark.parametrize("name", JOBSETS)
def test_a_jobset_restarts_all_hosts_together(name):
    manifest = Manifest(name)
    assert manifest.whole["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert manifest.whole["kind"] == "JobSet"
    job = manifest.job
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == job["parallelism"]
    # A pod that ends fails its job, which restarts the set; but for a setting that is wrong, which
    # another try would not mend, and whose reason ends the set.
    assert job["backoffLimit"] == 0
    [rule] = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {"operator": "In", "values": [UserError.status]}
    assert manifest.pod["restartPolicy"] == "Never"
    policy = manifest.whole["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    [ending] = policy["rules"]
    assert ending["action"] == "FailJobSet"
    assert ending["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert manifest.whole["spec"]["failurePolicy"]["maxRestarts"] > 0


@pytest.mark.parametrize("name", JOBSETS)
def test_a_jobsets_job_is_one_by_kubernetes_own_schema(name):
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "one"},
           "spec": Manifest(name).job}  # fmt: skip
    version = kubernetes_validate.latest_version()
    kubernetes_validate.validate(job, version, strict=True)
    pod = job["spec"]["template"]["spec"]
    pod["containers"][0]["enviroment"] = pod["containers"][0].pop("env")
    with pytest.raises(kubernetes_validate.ValidationError, match="'enviroment' was unexpected"):
        kubernetes_validate.validate(job, version, strict=True)


@pytest.mark.parametrize("name", JOBSETS)
def test_a_jobset_runs_the_resumable_command_and_gives_it_time_to_save(name):
    manifest = Manifest(name)
    # The image's entrypoint stays: `command` would replace it, a shell there would keep SIGTERM.
    assert "command" not in manifest.container
    loads(manifest.container["args"])
    assert "run_dir=gs://" in " ".join(manifest.container["args"])
    assert manifest.pod["terminationGracePeriodSeconds"] >= 120


def test_gpu_pods_find_each_other():
    manifest = Manifest("jobset.yaml")
    assert manifest.replicated["replicas"] == 1  # the index below counts within one job
    network = manifest.whole["spec"]["network"]
    assert network["enableDNSHostnames"]
    # JobSet's name for the first pod: SET-JOB-REPLICA-INDEX.SUBDOMAIN.
    first = f"{manifest.whole['metadata']['name']}-{manifest.replicated['name']}-0-0"
    host, port = manifest.environment["MONTESSORI_COORDINATOR"]["value"].split(":")
    assert host == f"{first}.{network['subdomain']}"
    assert {"containerPort": int(port)} in manifest.container["ports"]
    # The pods' own host names hold on the pods' network alone.
    assert not manifest.pod.get("hostNetwork")
    assert manifest.environment["MONTESSORI_PROCESSES"]["value"] == str(manifest.job["completions"])
    index = manifest.environment["MONTESSORI_PROCESS"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert index == "metadata.annotations['batch.kubernetes.io/job-completion-index']"


def test_tpu_pods_leave_it_to_jax():
    manifest = Manifest("jobset_tpu.yaml")
    named = {name for name in manifest.environment if name.startswith("MONTESSORI_")}
    assert named == {"MONTESSORI_CLUSTER"}
    assert manifest.environment["MONTESSORI_CLUSTER"]["value"] == "auto"
    topology = manifest.pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = manifest.container["resources"]["limits"]["google.com/tpu"]
    across, down = topology.split("x")
    assert chips * manifest.job["completions"] == int(across) * int(down)


def test_the_launchers_set_no_other_variable_than_the_program_reads():
    texts = [path.read_text() for path in LAUNCH.iterdir()]
    assert {name for text in texts for name in re.findall(r"\bMONTESSORI_[A-Z]+", text)} == NAMES
    read = set(re.findall(r"\bMONTESSORI_[A-Z]+", Path(cluster.__file__).read_text()))
    assert read >= NAMES


def test_the_skypilot_task_is_one_process_a_node_which_signals_reach(clone):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert task["workdir"] == "."  # where setup and run begin
    assert task["envs"]["RUN_DIR"] is None  # so that SkyPilot asks for it
    loads(["run", task["envs"]["CONFIG"], *task["envs"]["OVERRIDES"].split()])
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    shellcheck = shutil.which("shellcheck", path=places)
    assert shellcheck, "pip install -e '.[dev]'"
    found = subprocess.run([shellcheck, "-s", "bash", "-"], input=task["run"], text=True)
    assert found.returncode == 0

    variables = environment(
        **(
            task["envs"]
            | task["secrets"]
            | {"RUN_DIR": "gs://b/r", "OVERRIDES": "seed=1 dpo.beta=2"}
        ),
        SKYPILOT_NODE_IPS="10.0.0.7\n10.0.0.8",
        SKYPILOT_NUM_NODES=2,
        SKYPILOT_NODE_RANK=1,
    )
    # A file, as SkyPilot makes one: of `bash -c` bash would replace itself by the last command.
    (clone / "task").write_text(task["run"])
    process = subprocess.Popen(["bash", "task"], cwd=clone, env=variables)
    wait_until(lambda: has_started(clone))
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    config = task["envs"]["CONFIG"]
    assert (clone / "said").read_text() == (
        f"cuda: run {config} run_dir=gs://b/r seed=1 dpo.beta=2\nstopped\n"
    )
    assert (clone / "variables").read_text().split() == [
        "MONTESSORI_COORDINATOR=10.0.0.7:8476", "MONTESSORI_PROCESS=1", "MONTESSORI_PROCESSES=2",
    ]  # fmt: skip
    local = subprocess.run(["bash", "task"], cwd=clone, env=variables | {"RUN_DIR": "r"})
    assert local.returncode == 2


def test_xpk_is_asked_for_the_resumable_command_word_by_word(clone):
    asked = clone / "asked"
    (clone / "bin").mkdir()
    (clone / "bin" / "xpk").write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "$@" > {asked}\n')
    (clone / "bin" / "xpk").chmod(0o755)
    settings = {"CLUSTER": "c", "ZONE": "z", "TYPE": "v6e-16", "IMAGE": "i", "SLICES": 2}
    variables = environment(**settings, PATH=f"{clone}/bin:{os.environ['PATH']}")
    words = ["my.yaml", "run_dir=gs://b/r", "tracker=[a, b]"]
    script = clone / "launch" / "xpk.sh"
    dry = subprocess.run(
        [script, "--dry-run", *words], env=variables, capture_output=True, text=True, check=True
    )
    assert not asked.exists()
    subprocess.run([script, *words], env=variables, check=True)
    given = asked.read_text().splitlines()
    assert shlex.split(dry.stdout) == ["xpk", *given]
    assert given[:2] == ["workload", "create"]
    options = dict(one.removeprefix("--").split("=", 1) for one in given[2:])
    assert options["env"] == "MONTESSORI_CLUSTER=auto"
    assert options["num-slices"] == "2"
    assert int(options["max-restarts"]) > 0
    assert options["restart-on-exit-codes"] == str(
        LostProcess.status
    )  # xpk restarts on 127 and above by itself
    assert int(options["termination-grace-period-seconds"]) >= 120
    # xpk runs it in a subshell: exec leaves no shell between its signal and Python.
    assert shlex.split(options["command"]) == ["exec", "montessori", "run", *words]
    bare = subprocess.run([script], env=environment(), capture_output=True, text=True)
    assert bare.returncode == 2
    assert "launch/xpk.sh CONFIG" in bare.stdout


def test_the_image_starts_montessori_itself():
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    [entry] = [line for line in lines if line.startswith("ENTRYPOINT")]
    # exec form: a JSON list, without a shell that would keep SIGTERM.
    assert json.loads(entry.removeprefix("ENTRYPOINT")) == ["montessori"]
    targets = {line.split()[-1] for line in lines if line.startswith("FROM base AS")}
    assert targets == {"tpu", "cuda"}
    installed = set(re.findall(r"pip install .*'\.\[(\w+),gcs\]'", "\n".join(lines)))
    assert installed == targets
    ignored = (LAUNCH / "Dockerfile.dockerignore").read_text().split()
    assert {".git", ".env", ".venv", "runs"} <= set(ignored)
