"""Stages: supervised fine-tuning of a student, ending as a model folder or as a warm student.

``finetune`` writes ``student/`` (a Hugging Face folder), ``warm_up`` writes ``state/`` (parameters
and optimizer state, where influence starts). Both write ``metrics.jsonl`` and resume by step.
"""

from typing import Any

from montessori_jax.config import OptimizerConfig, SftConfig, WarmupConfig, as_dict
from montessori_jax.config_file import build
from montessori_jax.data.chat import ChatFormat
from montessori_jax.data.encode import EncodedRows, encode_rows
from montessori_jax.data.rows import read_rows
from montessori_jax.models import Model
from montessori_jax.models.loaded import LoadedModel
from montessori_jax.runs import remove_tree
from montessori_jax.stages.trained import export, lora_notes, step_flops, to_train
from montessori_jax.training.checkpoints import Checkpoints, Student, save_student
from montessori_jax.training.schedules import rate_table
from montessori_jax.training.sft import train_sft
from montessori_jax.training.state import TrainState
from montessori_jax.work import CHECKPOINTS, Work


def finetune(student: LoadedModel, data: str, settings: SftConfig, work: Work) -> dict[str, Any]:
    """Train a fresh student on the first ``settings.rows`` usable rows and export it.

    With LoRA ``student/`` is merged, and ``adapter/`` beside it is the adapter in peft's layout.
    """
    model, state, result = _train(student, data, settings, work)
    card = _card(student, data, settings, result)
    export(work.folder, "student", model, state.params, student, card)
    remove_tree(work.folder / CHECKPOINTS)
    return result


def warm_up(student: LoadedModel, data: str, settings: WarmupConfig, work: Work) -> dict[str, Any]:
    """Train a student and keep its optimizer state: the point that influence is measured from."""
    model, state, result = _train(student, data, settings, work)
    own = {name: value for name, value in as_dict(settings).items() if name in OPTIMIZER_FIELDS}
    rate = float(rate_table(settings, int(state.step))[-1])
    save_student(
        work.folder / "state",
        Student(
            state=state,
            settings=build(OptimizerConfig, own, "warm-up"),
            learning_rate=rate,
            about={
                "model": student.name,
                "fingerprint": student.fingerprint,
                **lora_notes(model, settings),
            },
        ),
    )
    remove_tree(work.folder / CHECKPOINTS)
    return {**result, "learning_rate": rate}


OPTIMIZER_FIELDS = frozenset(as_dict(OptimizerConfig()))


def _train(
    student: LoadedModel, data: str, settings: SftConfig, work: Work
) -> tuple[Model, TrainState, dict[str, Any]]:
    model, params = to_train(student, settings, work.seed)
    chat = ChatFormat.of(student)
    encoded = encode_rows(read_rows(data), chat, settings.max_length, limit=settings.rows)
    metrics = work.metrics()
    bar = work.bar(0, "step", "training")

    def record(row: dict[str, Any]) -> None:
        metrics.write(row)
        work.meter.count(
            trained_tokens=row["tokens"],
            flops=step_flops(model) * row["tokens"],
        )

    with bar, metrics:
        state = train_sft(
            model,
            params,
            encoded.chats,
            settings,
            seed=work.seed,
            fingerprint=student.fingerprint,
            checkpoints=Checkpoints(work.folder / CHECKPOINTS, say=work.say),
            metrics=record,
            progress=bar.reach,
            say=work.say,
            stop_requested=work.stop.requested,
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
