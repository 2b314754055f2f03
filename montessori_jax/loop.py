"""One iteration of the loop: its surroundings, and how a stage is run in them."""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from etils import epath

from montessori_jax import cluster
from montessori_jax.config import RunConfig
from montessori_jax.costs import Meter, describe_cost
from montessori_jax.errors import Interrupted
from montessori_jax.generation.teacher import Teachers
from montessori_jax.host_memory import return_freed_memory
from montessori_jax.hub import push_stage
from montessori_jax.runs import RunDirectory
from montessori_jax.seeding import derive_seed
from montessori_jax.serving.teachers import BackEnd
from montessori_jax.stage_process import in_own_process
from montessori_jax.stopping import Stop
from montessori_jax.trackers import Tracking
from montessori_jax.work import Work

# What a stage goes on from: journals, metrics, reference log-probs.
RESUMED = ("*.jsonl", "*.npz")
Result = dict[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Loop:
    """One iteration's surroundings: settings, folders, and how a stage is run.

    ``teacher`` is the model that the iteration begins with; ``own_process``, if given, runs a stage
    that trains in a process of its own (`montessori_jax.pipeline.run_stage`).
    """

    config: RunConfig
    directory: RunDirectory
    iteration: int
    teacher: str
    stop: Stop
    say: Say
    quiet: bool
    teachers: Teachers | None = None  # None in a stage's own process, which only trains
    back_end: BackEnd = "jax"
    own_process: Callable[..., None] | None = None
    only: str | None = None  # in a stage's own process, that stage
    profile: Path | None = None  # where traces of the stages go

    def folder(self, stage: str, iteration: int | None = None) -> str:
        """Where a stage writes, of this iteration or of an earlier one."""
        return str(self.directory.path / f"iteration-{iteration or self.iteration}" / stage)

    def result(self, stage: str) -> Result:
        """What a stage of this iteration reported that is done."""
        found = self.directory.stage(f"iteration-{self.iteration}/{stage}").result()
        assert found is not None, f"{stage} is not done"
        return found

    def states(self, stage: str) -> str:
        """Where a stage of this iteration writes training states."""
        return str(self.store(f"iteration-{self.iteration}/{stage}") or self.folder(stage))

    def store(self, stage: str) -> epath.Path | None:
        """A stage's folder at the URL, for processes that share no disk."""
        return self.directory.store / stage if self.directory.store else None

    def stage(
        self,
        name: str,
        body: Callable[[Work], Result],
        line: Callable[[Result], str],
        *,
        draws: str = "",
        trains: bool = False,
        alone: bool = False,
    ) -> Result:
        """Run one stage, or give its result if it is done; say in one line what came of it.

        ``draws`` keys the stage's random draws (by default its name): stages that share it draw
        alike. ``trains`` is whether it needs the accelerator for JAX, ``alone`` whether the leader
        runs it without the other processes.
        """
        full = f"iteration-{self.iteration}/{name}"
        folder = self.directory.stage(full)
        cluster.barrier(full)
        done = cluster.from_leader(folder.result())
        if self.only is not None and full != self.only:
            assert done is not None, f"{full} comes before {self.only} and is not done"
            return done
        if done is not None:
            self.say(f"{full}: done before: {line(done)}")
            if cluster.is_leader():
                self.push(full, folder.path)
            return done
        if cluster.any_of(self.stop.requested()):
            raise Interrupted("stopped on request")
        if trains and self.teachers is not None:
            self.teachers.release()
        if trains and self.own_process is not None:
            about = (
                self.config, self.directory.path, self.iteration, self.teacher, self.back_end, full,
                self.quiet, self.profile,
            )  # fmt: skip
            memory = {"XLA_PYTHON_CLIENT_MEM_FRACTION": str(self.config.jax_memory_fraction)}
            in_own_process(self.own_process, about, stop=self.stop, environment=memory)
            made = folder.result()
            assert made is not None, f"{full} ended without its marker"
            self.directory.send()
            return made
        if cluster.is_leader():
            cluster.barrier(f"{full} begins")
            meter = Meter(self.directory.path / "costs.jsonl", full)
            finished = False
            try:
                result = body(self.work(folder.path, full, draws or name, meter))
                finished = True
            finally:
                cost = meter.close(finished)
                return_freed_memory()
            folder.finish(result)
            self.directory.send()
            self.say(f"{full}: {line(result)}  ({describe_cost(cost)})")
            self.push(full, folder.path)
        else:
            self.follow(folder.path, full, draws or name, None if alone else body)
        cluster.barrier(f"{full} ends")
        if self.only is not None:
            raise StageEnded
        self.directory.share()
        made = cluster.from_leader(folder.result())
        assert made is not None, f"{full} ended without its marker"
        return made

    def work(self, folder: Path, stage: str, draws: str, meter: Meter) -> Work:
        """The surroundings of a stage that writes into ``folder``."""
        seed = derive_seed(self.config.seed, self.iteration, draws)
        return Work(
            folder,
            seed,
            meter,
            self.stop,
            self.say,
            self.quiet,
            self.tracking(stage),
            traces=self.profile / stage if self.profile else None,
            store=self.store(stage),
        )

    def follow(
        self, folder: Path, stage: str, draws: str, body: Callable[[Work], Result] | None
    ) -> None:
        """A stage in a process that is not the leader: the same, beginning with what the leader
        has of it, in a folder that goes away."""
        with tempfile.TemporaryDirectory(prefix=f"montessori-{cluster.index()}-") as place:
            own = Path(place) / "stage"
            own.mkdir()
            for path in (path for kind in RESUMED for path in folder.glob(kind)):
                shutil.copyfile(path, own / path.name)
            cluster.barrier(f"{stage} begins")
            if body is not None:
                work = self.work(own, stage, draws, Meter(None, stage))
                body(replace(work, kept=folder, tracking=Tracking(), traces=None))

    def tracking(self, stage: str) -> Tracking:
        """Where the stage's metrics go besides their file."""
        path = self.directory.path
        kinds, project = self.config.tracker, self.config.tracker_project
        return Tracking(kinds, project, path.resolve().name, stage, path / "tracker")

    def push(self, stage: str, folder: Path) -> None:
        """Push what a finished stage made, if that is asked for and not done yet."""
        prefix = self.config.push_to_hub
        if prefix:
            push_stage(folder, stage, prefix, private=self.config.push_private, say=self.say)


class StageEnded(Exception):
    """The one stage that a process is for has ended."""
