"""Stage: DPO of the teacher on preference pairs; writes ``teacher/`` and ``metrics.jsonl``.

With LoRA ``teacher/`` is merged, and ``adapter/`` beside it is the adapter in peft's layout.
Teachers kept on the way are in ``teachers/step-N``, alike.
"""

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from montessori_jax import cluster
from montessori_jax.config import DpoConfig, as_dict
from montessori_jax.data.chat import ChatFormat
from montessori_jax.data.own_parts import read_table_together
from montessori_jax.data.tables import Table
from montessori_jax.device_memory import fits_in_memory
from montessori_jax.errors import UserError
from montessori_jax.models.loaded import LoadedModel
from montessori_jax.models.sources import model_fingerprint
from montessori_jax.serving.probe import write_probe
from montessori_jax.stages.probe import greedy_texts, probe_texts
from montessori_jax.stages.trained import export, step_flops, to_train
from montessori_jax.training.checkpoints import Checkpoints
from montessori_jax.training.dpo import evaluate_dpo, train_dpo
from montessori_jax.training.pairs import EncodedPair, fit_pair
from montessori_jax.training.reference_log_probs import pair_log_probs, reference_log_probs
from montessori_jax.training.state import TrainState
from montessori_jax.work import PROFILED_STEPS, Work


def encode_pairs(
    rows: Table, chat: ChatFormat, origin: str
) -> tuple[list[EncodedPair], dict[str, int]]:
    """Rows with ``prompt``, ``chosen`` and ``rejected`` as token ids, and skipped rows by cause.

    ``prompt`` is a list of chat messages (or that as JSON), or plain text; ``prefill`` how the
    answer was made to begin; ``chosen`` and ``rejected`` are texts, or lists of one assistant
    message. The processes of a job call this together: each encodes rows of its own.
    """
    pairs: list[EncodedPair] = []
    skipped: Counter[str] = Counter()
    numbered = list(enumerate(rows))
    for encoded in cluster.shared_out(numbered, lambda one: _encoded_pair(*one, chat)):
        if isinstance(encoded, str):
            skipped[encoded] += 1
        else:
            pairs.append(encoded)
    if not pairs:
        raise UserError(f"{origin}: no usable pair: {dict(skipped)}")
    return pairs, dict(skipped)


def _encoded_pair(number: int, row: dict[str, Any], chat: ChatFormat) -> EncodedPair | str:
    """A row's pair, or why it has none."""
    try:
        prompt, prefill = prompt_of(row["prompt"]), row.get("prefill") or ""
        chosen, rejected = _answer(row["chosen"]), _answer(row["rejected"])
    except (KeyError, TypeError, ValueError) as error:
        return f"malformed ({' '.join(str(error).split())[:60]})"
    return EncodedPair(
        f"{row.get('prompt_id', '')}#{number}",
        chat.encode_answer(prompt, chosen, prefill=prefill),
        chat.encode_answer(prompt, rejected, prefill=prefill),
    )


def _encode_all(
    sources: Sequence[str], chat: ChatFormat
) -> tuple[list[EncodedPair], dict[str, int]]:
    """The pairs of all sources, and skipped rows by cause."""
    pairs: list[EncodedPair] = []
    skipped: Counter[str] = Counter()
    for source in sources:
        rows = read_table_together(source, ("prompt", "chosen", "rejected"))
        some, causes = encode_pairs(rows, chat, source)
        pairs += some
        skipped.update(causes)
    return pairs, dict(skipped)


def prompt_of(value: Any) -> Any:
    """A prompt as chat messages or as text: as given, or from JSON. ValueError where neither."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return value
    if isinstance(value, str):
        return value
    if not value or not all(
        isinstance(m, dict) and isinstance(m.get("content"), str) for m in value
    ):
        raise ValueError("prompt is neither text nor messages")
    return value


def _answer(value: Any) -> str:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        value = value[0].get("content")
    if not isinstance(value, str) or not value.strip():
        raise ValueError("an empty or missing answer")
    return value


def dpo(
    teacher: LoadedModel,
    pairs: str | Sequence[str],
    settings: DpoConfig,
    work: Work,
    *,
    heldout: str | None = None,
    probe: bool = False,
) -> dict[str, Any]:
    """Tune ``teacher``; measure held-out pairs before and after, on the policy and its reference.

    Args:
        teacher: policy and reference alike.
        pairs: a table of pairs, or the preferences stage's folder; or several.
        settings: loss, optimizer and numerics.
        work: where to write.
        heldout: pairs to measure on; by default the folders' ``heldout``, if any.
        probe: leave ``probe.json``, by which a server of the tuned teacher can be checked.
    """
    sources = [pairs] if isinstance(pairs, str) else pairs
    given = [str(Path(one) / "pairs") if (Path(one) / "pairs").is_dir() else one for one in sources]
    beside = [str(Path(one) / "heldout") for one in sources if (Path(one) / "heldout").is_dir()]
    chat = ChatFormat.of(teacher)
    training, skipped = _encode_all(given, chat)
    held, _ = _encode_all(beside if heldout is None else [heldout], chat)
    everything = [*training, *held]
    model, parameters = teacher.model, teacher.model.parameter_count()
    with (
        _fits("the pass over the pairs before DPO", settings),
        work.bar(len(everything), "pair", "reference log-probs") as bar,
    ):
        log_probs = reference_log_probs(
            model,
            teacher.params,
            everything,
            settings,
            cache=work.file("reference_log_probs.npz"),
            fingerprints=(teacher.fingerprint, settings.held_dtype),
            say=work.say,
            progress=bar.reach,
            stop_requested=work.stop.requested,
        )
    before, after = log_probs[: len(training)], log_probs[len(training) :]
    # The reference's pass over every pair, the tuned teacher's over the held-out ones.
    passes = sum(pair.length for pair in (*everything, *held))
    work.meter.count(flops=2.0 * parameters * passes)
    with _fits("the probe of the teacher before DPO", settings):
        asked = greedy_texts(teacher, training) if probe else []
        old = pair_log_probs(model, teacher.params, asked, settings)
    # With LoRA the reference is the policy with its adapter left out.
    model, params = to_train(teacher, settings, work.seed)
    metrics = work.metrics()
    bar = work.bar(0, "step", "dpo")

    def record(row: dict[str, Any]) -> None:
        metrics.write(row)
        work.meter.count(trained_tokens=row["tokens"], flops=step_flops(model) * row["tokens"])

    def keep(step: int, state: TrainState) -> None:
        if settings.keep_every and step % settings.keep_every == 0:
            card = f"# Teacher after {step} steps of DPO\n\nFrom `{teacher.name}`.\n"
            place = kept_teacher(work.folder, step).parent
            export(place, "teacher", model, state.params, teacher, card, consume=False)

    with bar, metrics, work.profile(*PROFILED_STEPS) as profile:
        state = train_dpo(
            model,
            params,
            training,
            settings,
            reference=before,
            seed=work.seed,
            checkpoints=Checkpoints(work.checkpoints, settings.checkpoints_kept, work.say),
            metrics=record,
            progress=profile.along(bar.reach),
            say=work.say,
            stop_requested=work.stop.requested,
            after=keep,
            consume=True,
        )
    result: dict[str, Any] = {
        "pairs": sum(fit_pair(pair, settings.max_length) is not None for pair in training),
        "skipped": skipped,
    }
    if held:
        result["heldout_before"] = evaluate_dpo(held, after, after, settings)
        with _fits("the pass over the held-out pairs after DPO", settings):
            policy = pair_log_probs(
                model, state.params, held, settings, stop_requested=work.stop.requested
            )
        result["heldout_after"] = evaluate_dpo(held, policy, after, settings)
    rows = metrics.read()
    result |= {
        "steps": rows[-1]["steps"],
        "first_loss": rows[0]["loss"],
        "last_loss": rows[-1]["loss"],
        "last_margin": rows[-1]["reward_margin"],
        "kl": rows[-1]["kl"],
    }
    with _fits("the probe of the tuned teacher", settings):
        new = pair_log_probs(model, state.params, asked, settings)
    card = _card(teacher, settings, result)
    export(work.folder, "teacher", model, state.params, teacher, card)
    if asked:
        tuned = model_fingerprint(str(work.folder / "teacher"))
        write_probe(work.folder, tuned, teacher.fingerprint, probe_texts(asked, old, new))
    work.remove_checkpoints()
    return result


def _fits(what: str, settings: DpoConfig) -> AbstractContextManager[None]:
    """`fits_in_memory`, for what DPO does beside its steps."""
    narrow = "" if settings.dtype == "bfloat16" else ", or set dpo.dtype to bfloat16"
    return fits_in_memory(
        what,
        f"lower dpo.micro_batch (now {settings.micro_batch}) or dpo.max_length (now "
        f"{settings.max_length}){narrow}",
    )


def kept_teacher(folder: Path, step: int) -> Path:
    """Where the teacher of ``step`` is that ``keep_every`` keeps."""
    return folder / "teachers" / f"step-{step}" / "teacher"


def kept_teachers(folder: Path) -> dict[int, str]:
    """The teachers that ``keep_every`` kept in a stage's folder, by their steps."""
    found = (folder / "teachers").glob("step-*")
    steps = sorted(int(place.name.removeprefix("step-")) for place in found)
    return {step: str(kept_teacher(folder, step)) for step in steps}


def _card(teacher: LoadedModel, settings: DpoConfig, result: dict[str, Any]) -> str:
    lines = [
        "# Teacher tuned by DPO",
        "",
        f"From `{teacher.name}` by direct preference optimisation on {result['pairs']} pairs of "
        f"its own texts, in {result['steps']} optimizer steps, with montessori_jax.",
        "",
        f"DPO loss: {result['first_loss']:.4f} at the first step, {result['last_loss']:.4f} at the "
        f"last; KL to the untuned teacher {result['kl']:.4f} nats a response token.",
        "",
    ]
    if "heldout_after" in result:
        held = result["heldout_after"]
        lines += [
            f"On {held['pairs']} held-out pairs: reward margin {held['reward_margin']:+.4f}, "
            f"accuracy {held['reward_accuracy']:.0%}.",
            "",
        ]
    lines += ["Settings: " + ", ".join(f"{k} {v}" for k, v in as_dict(settings).items()) + ".", ""]
    return "\n".join(lines)
