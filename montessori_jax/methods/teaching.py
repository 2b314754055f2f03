"""What all methods share: a teacher writes, students are trained on what it wrote and evaluated.

Stages that stand for the same step in different methods have the same name or draw alike, so that
at equal seeds methods differ in nothing else.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

from montessori_jax.config import EvaluationConfig, TrainingConfig
from montessori_jax.data.tables import count_rows
from montessori_jax.dtypes import forward_dtype
from montessori_jax.evaluation import Context
from montessori_jax.generation.teacher import Teacher
from montessori_jax.loop import Loop, Result
from montessori_jax.mesh import make_mesh
from montessori_jax.models.loaded import LoadedModel
from montessori_jax.models.sources import load_model
from montessori_jax.report import lines
from montessori_jax.serving.teachers import UrlTeachers
from montessori_jax.stages.evaluate import evaluate
from montessori_jax.stages.finetune import finetune
from montessori_jax.stages.generate import generate
from montessori_jax.stages.similarity import compare_texts
from montessori_jax.work import Work

Body = Callable[[Work], Result]


def teacher(loop: Loop, source: str) -> Teacher:
    """The model ``source`` (or the one behind the run's address), ready to write."""
    assert loop.teachers is not None
    return loop.teachers.teacher(source)


def judge_of(loop: Loop) -> Teacher:
    """Who judges: the model behind ``judge.base_url``, or the iteration's own teacher."""
    if loop.config.judge.base_url:
        return UrlTeachers(loop.config.judge).teacher("")
    return teacher(loop, loop.teacher)


def fresh_student(loop: Loop, settings: TrainingConfig) -> LoadedModel:
    """The student as the run was given it, to be trained by ``settings``."""
    mesh = make_mesh(loop.config.mesh)
    return load_model(loop.config.student, dtype=settings.held_dtype, mesh=mesh)


def write_data(loop: Loop, source: str, prompts: int) -> Body:
    """The stage in which ``source`` writes instructions and responses from the seeds."""
    config = loop.config

    def body(work: Work) -> Result:
        writer = teacher(loop, source)
        return generate(
            writer, config.data.seeds, config.generation, config.responses, work, prompts=prompts
        )

    return body


def synthesise(loop: Loop, name: str, source: str) -> str:
    """Training data by ``source``: the same prompts, filters and draws whoever writes."""
    writes = write_data(loop, source, loop.config.synthesis_prompts)
    loop.stage(f"synthesise-{name}", writes, lines.generated, draws="synthesise")
    return loop.folder(f"synthesise-{name}")


def synthesise_with_tuned(loop: Loop, tuned: str) -> dict[str, str]:
    """Data of the tuned teacher and, if asked for, of the one that the run began with beside it.

    The latter is Self-Instruct: the same prompts, filters, budget and draws.
    """
    data_of = {}
    if loop.config.compare_self_instruct:
        data_of["untuned"] = synthesise(loop, "untuned", loop.config.teacher)
    data_of["tuned"] = synthesise(loop, "tuned", tuned)
    if loop.config.compare_self_instruct:
        loop.stage(
            "similarity",
            lambda work: compare_texts(data_of["untuned"], data_of["tuned"], work),
            lines.compared,
            alone=True,
        )
    return data_of


def train(loop: Loop, name: str, data: str, rows: int, *, states: int = 0) -> str:
    """A fresh student trained on the first ``rows`` of ``data``; its folder.

    ``states`` are the steps between states that it keeps along the way; 0 keeps none.
    """
    budget = replace(loop.config.sft, rows=rows)
    loop.stage(
        f"train-{name}",
        lambda work: finetune(fresh_student(loop, budget), data, budget, work, states=states),
        lines.trained,
        draws="train",
        trains=True,
    )
    return loop.folder(f"train-{name}/student")


def train_and_evaluate(loop: Loop, data_of: Mapping[str, str]) -> None:
    """A student for each data set, on equally many rows, and what has become of them."""
    sizes = map(count_rows, data_of.values())
    rows = min(loop.config.sft.rows, *sizes)
    states = loop.config.curve.student_states
    students = {
        name: train(loop, name, place, rows, states=states) for name, place in data_of.items()
    }
    evaluate_students(loop, students, students.get("untuned", ""))


def evaluate_students(
    loop: Loop,
    students: Mapping[str, str],
    self_instruct: str = "",
    settings: EvaluationConfig | None = None,
) -> None:
    """Evaluate students by name, by the run's settings unless others are given; in the first
    iteration also the student as it is.

    ``self_instruct`` is the student of the untuned teacher, where there is one to compare with.
    """
    config = loop.config
    settings = settings or config.evaluation

    def evaluation(source: str) -> Body:
        dtype = forward_dtype(settings)
        return lambda work: evaluate(
            Context(
                load_model(source, dtype=dtype, mesh=make_mesh(config.mesh)),
                settings,
                work,
                heldout=config.data.heldout,
                num_heldout=config.data.num_heldout,
                judge=config.judge,
                reference=config.data.reference,
                num_reference=config.data.num_reference,
                self_instruct=self_instruct,
            )
        )

    untrained = {"untrained": config.student} if loop.iteration == 1 else {}
    for name, source in {**untrained, **students}.items():
        loop.stage(
            f"evaluate-{name}",
            evaluation(source),
            lines.evaluated,
            draws="evaluate",
            trains=True,
        )
