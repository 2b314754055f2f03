"""Stages: supervised fine-tuning of a student, ending as a model folder or as a warm student.

``finetune`` writes ``student/`` (a Hugging Face folder), ``warm_up`` writes ``state/`` (parameters
and optimizer state, where influence starts). Both write ``metrics.jsonl`` and resume by step.
"""

from collections.abc import Callable
from typing import Any

from etils import epath

from montessori_jax.config import OptimizerConfig, SftConfig, WarmupConfig, as_dict
from montessori_jax.config_file import build
from montessori_jax.data.chat import ChatFormat
from montessori_jax.data.encode import EncodedRows, encode_rows
from montessori_jax.data.own_parts import read_rows_together
from montessori_jax.models import Model
from montessori_jax.models.loaded import LoadedModel
from montessori_jax.stages.trained import export, lora_notes, step_flops, to_train
from montessori_jax.training import places
from montessori_jax.training.checkpoints import Checkpoints, Student, save_student
from montessori_jax.training.loop import nothing
from montessori_jax.training.places import Place
from montessori_jax.training.schedules import rate_table
from montessori_jax.training.sft import train_sft
from montessori_jax.training.state import TrainState
from montessori_jax.work import PROFILED_STEPS, STATE, STATES, Work


def finetune(
    student: LoadedModel, data: str, settings: SftConfig, work: Work, *, states: int = 0
) -> dict[str, Any]:
    """Train a fresh student on the first ``settings.rows`` usable rows and export it.

    With LoRA ``student/`` is merged, and ``adapter/`` beside it is the adapter in peft's layout.
    ``states`` are the steps between states kept along the way (`kept_state`), each a student that
    influence can be measured on; 0 keeps none.
    """

    def keep(step: int, model: Model, state: TrainState) -> None:
        if states and step % states == 0:
            # At one rate all along, or influence would shrink with the schedule's.
            rate = settings.learning_rate
            _save(kept_state(work.states, step), student, model, state, settings, rate)

    encoded = _encoded(student, data, settings)
    model, state, result = train(student, encoded, settings, work, keep)
    card = _card(student, data, settings, result)
    export(work.folder, "student", model, state.params, student, card)
    work.remove_checkpoints()
    return result


def warm_up(student: LoadedModel, data: str, settings: WarmupConfig, work: Work) -> dict[str, Any]:
    """Train a student and keep its optimizer state: the point that influence is measured from."""
    model, state, result = train(student, _encoded(student, data, settings), settings, work)
    rate = float(rate_table(settings, int(state.step))[-1])
    _save(work.states / STATE, student, model, state, settings, rate)
    work.remove_checkpoints()
    return {**result, "learning_rate": rate}


OPTIMIZER_FIELDS = frozenset(as_dict(OptimizerConfig()))


def kept_state(states: Place, step: int) -> epath.Path:
    """Where the student of ``step`` is that `finetune` kept, below a stage's folder of states."""
    return epath.Path(states) / STATES / f"step-{step}"


def kept_states(states: Place) -> dict[int, str]:
    """The students that `finetune` kept below a stage's folder of states, by their steps."""
    found = places.names(kept_state(states, 0).parent)
    steps = sorted(int(name.removeprefix("step-")) for name in found)
    return {step: str(kept_state(states, step)) for step in steps}


def _save(
    folder: Place,
    student: LoadedModel,
    model: Model,
    state: TrainState,
    settings: SftConfig,
    rate: float,
) -> None:
    """Keep a student that influence can be measured on by probe steps of ``rate``."""
    own = {name: value for name, value in as_dict(settings).items() if name in OPTIMIZER_FIELDS}
    about = {
        "model": student.name,
        "fingerprint": student.fingerprint,
        **lora_notes(model, settings),
    }
    save_student(folder, Student(state, build(OptimizerConfig, own, "training"), rate, about))


def _encoded(student: LoadedModel, data: str, settings: SftConfig) -> EncodedRows:
    chat = ChatFormat.of(student)
    return encode_rows(read_rows_together(data), chat, settings.max_length, limit=settings.rows)


def train(
    student: LoadedModel,
    encoded: EncodedRows,
    settings: SftConfig,
    work: Work,
    keep: Callable[[int, Model, TrainState], None] = nothing,
) -> tuple[Model, TrainState, dict[str, Any]]:
    """Fine-tune on encoded rows: what is trained, its state, and counts and losses.

    Resumes step by step; the model's own parameters are used up. ``keep`` is given the steps done,
    what is trained and its state after each step.
    """
    model, params = to_train(student, settings, work.seed)
    metrics = work.metrics()
    bar = work.bar(0, "step", "training")

    def record(row: dict[str, Any]) -> None:
        metrics.write(row)
        work.meter.count(
            trained_tokens=row["tokens"],
            flops=step_flops(model) * row["tokens"],
        )

    with bar, metrics, work.profile(*PROFILED_STEPS) as profile:
        state = train_sft(
            model,
            params,
            encoded.chats,
            settings,
            seed=work.seed,
            fingerprint=student.fingerprint,
            checkpoints=Checkpoints(work.checkpoints, settings.checkpoints_kept, work.say),
            metrics=record,
            progress=profile.along(bar.reach),
            say=work.say,
            stop_requested=work.stop.requested,
            after=lambda step, state: keep(step, model, state),
            consume=True,
        )
    rows = metrics.read()
    return model, state, _result(encoded, rows)


def _result(encoded: EncodedRows, metrics: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "rows": len(encoded.chats),
        "tokens": encoded.tokens,
        "skipped": encoded.causes(),
        "cut": encoded.cut,
        "steps": metrics[-1]["steps"],
        "first_loss": metrics[0]["loss"],
        "last_loss": metrics[-1]["loss"],
    }


def _card(student: LoadedModel, data: str, settings: SftConfig, result: dict[str, Any]) -> str:
    return "\n".join(
        [
            "# Student fine-tuned on instruction data",
            "",
            f"From `{student.name}` by supervised fine-tuning on {result['rows']} rows "
            f"({result['tokens']} tokens) of `{data.rsplit('/', 2)[-1]}`, in {result['steps']} "
            "optimizer steps, with montessori_jax.",
            "",
            f"Loss in nats a response token: {result['first_loss']:.4f} at the first step, "
            f"{result['last_loss']:.4f} at the last.",
            "",
            "Settings: " + ", ".join(f"{k} {v}" for k, v in as_dict(settings).items()) + ".",
            "",
        ]
    )
