"""The evaluation ``lm_harness``: tasks of lm-evaluation-harness by name, on our models.

The harness is imported when the evaluation is called; `montessori_jax.evaluation.lm_harness.model`
is its model class.
"""

import importlib.util
import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from montessori_jax import cluster
from montessori_jax.config import HarnessConfig
from montessori_jax.data.writing import write_jsonl
from montessori_jax.errors import UserError
from montessori_jax.evaluation.context import Context, Result
from montessori_jax.runs import Journal

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

# The seeds of the harness's own command, so that the same shots are drawn as in its figures.
SEED, ARRAY_SEED, SHOTS_SEED = 0, 1234, 1234
WRITES = "generate_until"  # the output type of tasks that write text, and of those that name none


def lm_harness(context: Context) -> Result:
    """Run ``harness.tasks``; every sample is written to ``lm_harness/TASK.jsonl``.

    Answers are journalled (``lm_harness.jsonl``): after a kill only what is missing is computed.

    Returns:
        ``tasks`` and ``groups``: by name the metrics (``acc``, ``acc_norm``, ``exact_match,FILTER``
        ...) with their ``..._stderr``, ``shots``, ``samples`` and ``version``; ``group_subtasks``,
        the tasks and groups that each group is made of; ``named``, what was asked for; ``limit``,
        ``chat_template`` and ``max_length``, as the settings have them; ``lm_eval``, the version of
        the harness.

    Raises:
        UserError: the harness is not installed, or a task is unknown or cannot be had.
    """
    check_installed()
    import lm_eval
    from lm_eval.utils import handle_non_serializable

    from montessori_jax.evaluation.lm_harness.model import MontessoriLM

    settings, work, student = context.settings.harness, context.work, context.student
    model = MontessoriLM(
        student,
        settings=settings,
        dtype=context.settings.dtype,
        attention=context.settings.attention,
        work=work,
        journal=Journal(
            work.file("lm_harness.jsonl"),
            {
                "student": student.fingerprint,
                "dtype": context.settings.dtype,
                "max_length": settings.max_length,
                "max_gen_toks": settings.max_gen_toks,
                "seed": work.seed,
            },
        ),
    )
    with own_seeds(), one_process():
        tasks = load_tasks(settings.tasks, settings.include_path)
        found = lm_eval.evaluate(
            lm=model,
            task_dict=tasks,
            limit=settings.limit or None,
            apply_chat_template=settings.chat_template,
            fewshot_as_multiturn=settings.chat_template,
        )
    for name, samples in found["samples"].items():
        rows = [_plain(sample, handle_non_serializable) for sample in samples]
        folder = work.file("lm_harness")
        folder.mkdir(exist_ok=True)
        write_jsonl(folder / f"{name}.jsonl", rows)
    named = [_name_and_shots(one)[0] for one in settings.tasks]
    return {
        **summary(found),
        "named": named,
        "limit": settings.limit,
        "chat_template": settings.chat_template,
        "max_length": settings.max_length,
        "lm_eval": lm_eval.__version__,
    }


def check_installed() -> None:
    """Raise `UserError` where the harness is not."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm_harness needs lm-eval: pip install 'montessori-jax[eval]'")


def check_tasks(settings: HarnessConfig) -> None:
    """Whether the tasks are there and this job can run them; their data is not looked for.

    Raises:
        UserError: the harness is not installed, a name is unknown, or several processes are to
            write text.
    """
    check_installed()
    manager, wanted = _find_tasks(settings.tasks, settings.include_path)
    writing = [name for name, _ in wanted if _writes_text(name, manager.task_index)]
    if writing and cluster.count() > 1:
        raise UserError(
            f"harness.tasks {', '.join(writing)}: tasks that write text take one process: leave "
            "them out here, and run montessori evaluate on the trained students"
        )


def _find_tasks(
    names: Sequence[str], include_path: str
) -> tuple["TaskManager", list[tuple[str, int | None]]]:
    """The harness's index that has all the names, and these with their shots."""
    from lm_eval.tasks import TaskManager

    wanted = [_name_and_shots(one) for one in names]
    manager = None
    if include_path:
        if not os.path.isdir(include_path):
            raise UserError(f"harness.include_path {include_path}: no such folder")
        manager = TaskManager(include_path=include_path, include_defaults=False)
    if manager is None or any(name not in manager.all_tasks for name, _ in wanted):
        manager = TaskManager(include_path=include_path or None)
    for name, _ in wanted:
        if name not in manager.all_tasks:
            where = f"{include_path} nor in lm-eval" if include_path else "lm-eval"
            raise UserError(f"harness.tasks {name}: no such task in {where}: lm-eval ls tasks")
    return manager, wanted


def _writes_text(member: str | dict[str, Any], index: Mapping[str, Any]) -> bool:
    """Whether a task, or any of a group's or tag's, writes text by its YAML.

    A member of a group may be a name or a mapping with settings on top, or a group of its own.
    Tasks that are Python classes say nothing of it before they are loaded.
    """
    own = member if isinstance(member, dict) else {}
    name = member if isinstance(member, str) else own.get("group") or own.get("task")
    entry = index.get(name) if isinstance(name, str) else None
    if entry is not None and entry.cfg is None:  # a tag
        return any(_writes_text(one, index) for one in entry.tags)
    config = own if entry is None else entry.cfg
    if "group" in config:
        return any(_writes_text(one, index) for one in config.get("task") or ())
    config = {**config, **own}
    return "class" not in config and config.get("output_type", WRITES) == WRITES


def load_tasks(names: Sequence[str], include_path: str) -> dict[str, Any]:
    """Tasks and groups of the harness with the numbers of shots that ``NAME:SHOTS`` ask for.

    A folder's own tasks come first; the harness's, of which there are many thousand, are only
    looked through for names that it lacks.

    Raises:
        UserError: a name is unknown, its data cannot be had, or a zero-shot task is to have shots.
    """
    manager, wanted = _find_tasks(names, include_path)
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name, shots in wanted:
        try:
            found = manager.load([name])
        except Exception as error:  # data sets' libraries raise anything
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"harness.tasks {name}: its data cannot be had: {reason}") from error
        for task_name, task in found["tasks"].items():
            if task_name in loaded["tasks"]:
                raise UserError(f"harness.tasks {name}: {task_name} is in it twice: name it once")
            _set_shots(task_name, task, shots)
        for part in loaded:
            loaded[part] |= found[part]
    return loaded


def _name_and_shots(text: str) -> tuple[str, int | None]:
    name, separator, shots = text.rpartition(":")
    if not separator:
        return text, None
    if not name or not shots.isdigit():
        raise UserError(f"harness.tasks {text}: NAME or NAME:SHOTS, such as arc_challenge:25")
    return name, int(shots)


def _set_shots(name: str, task: Any, shots: int | None) -> None:
    own = task.get_config("num_fewshot")
    if own == 0 and shots:
        raise UserError(f"harness.tasks {name}:{shots}: it is a zero-shot task: leave :{shots} out")
    task.set_config(key="num_fewshot", value=(own or 0) if shots is None else shots)
    task.set_fewshot_seed(seed=SHOTS_SEED)


@contextmanager
def own_seeds() -> Iterator[None]:
    """The harness's seeds in the block; the state of Python's and NumPy's draws is put back."""
    before = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(SEED)
    np.random.seed(ARRAY_SEED)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002


@contextmanager
def one_process() -> Iterator[None]:
    """The harness forks to bootstrap errors, which a process with JAX's threads must not."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        del os.environ["DISABLE_MULTIPROC"]
        if before is not None:
            os.environ["DISABLE_MULTIPROC"] = before


def summary(found: dict[str, Any]) -> Result:
    """The harness's results, numbers alone, a task's together.

    A group that is not aggregated has no numbers; only ``group_subtasks`` names it.
    """

    def metrics(of: dict[str, Any]) -> dict[str, float]:
        numbers = {key.removesuffix(",none"): value for key, value in of.items()}
        return {
            key: float(value) for key, value in numbers.items()
            if isinstance(value, int | float) and key not in ("sample_len", "sample_count")
        }  # fmt: skip

    def about(name: str) -> dict[str, Any]:
        samples = (found["n-samples"].get(name) or {}).get("effective")
        extra = {"shots": found["n-shot"].get(name), "samples": samples}
        return {**extra, "version": str(found["versions"].get(name))}

    groups = found.get("groups") or {}
    measured = {name: metrics(of) for name, of in found["results"].items() if name not in groups}
    return {
        "tasks": {name: {**of, **about(name)} for name, of in measured.items() if of},
        "groups": {name: metrics(of) for name, of in groups.items()},
        "group_subtasks": found.get("group_subtasks") or {},
    }


def _plain(sample: dict[str, Any], other: Any) -> dict[str, Any]:
    """A logged sample as JSON values."""
    return json.loads(json.dumps(sample, default=other, ensure_ascii=False))
