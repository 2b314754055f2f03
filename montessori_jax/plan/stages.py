"""The stages that a config's method runs, and which program each of them needs, how much of it.

What `montessori_jax.methods` do, as a list that needs no model and no device: the first time round
the loop. Stages that need no program of ours are listed with the reason.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from montessori_jax.config import RunConfig
from montessori_jax.influence.costs import AUTOMATIC
from montessori_jax.influence.regime import resolved
from montessori_jax.influence.scoring import BASELINES
from montessori_jax.plan.work import ASSUMED, work_of

GROUPS = (
    *("generation", "judging", "warmup", "losses", "influence"),
    *("dpo", "bootstrap", "sft", "evaluation"),
)
ON_THE_HOST = "no program: tables on the host"
AUDIT = "audit in float32"  # of an estimator that measures in less
# The settings of training that decide what a step's program is, its constants aside.
SHAPING = (
    *("optimizer", "moments_dtype", "batch_size", "micro_batch", "max_length", "dtype", "remat"),
    *("attention", "lora_rank", "lora_targets", "lora_base_dtype"),
)


class Recipe(NamedTuple):
    """What makes a program: stages with equal recipes run the same one.

    ``kind`` is ``write`` (by a section, ``samples`` texts a prompt), ``train`` (by a section),
    ``dpo``, ``gradient`` (of the reference), ``score`` (``section`` is the estimator), ``audit``
    (by the definition in float32, where the rest is not) or ``losses`` (of the student: ``section``
    is warmup or evaluation).
    """

    kind: str
    section: str = ""
    samples: int = 1


class Use(NamedTuple):
    """A stage's part of a program: prompts, tokens, pairs, candidates or reference sets.

    ``group`` is one of `GROUPS`.
    """

    stage: str
    group: str
    recipe: Recipe
    amount: float


@dataclass
class Stages:
    """What an iteration does.

    Attributes:
        config: the settings.
        uses: of programs, in the order of the loop.
        unplanned: stage and reason, of what has no program here.
    """

    config: RunConfig
    uses: list[Use] = field(default_factory=list)
    unplanned: list[tuple[str, str]] = field(default_factory=list)

    @property
    def teacher_needed(self) -> bool:
        """Whether any program is of the teacher; behind an address it has no weights here."""
        kinds = {(use.recipe.kind, use.recipe.section) for use in self.uses}
        return any(kind in ("write", "dpo") or one == "bootstrap" for kind, one in kinds)

    def add(self, stage: str, group: str, recipe: Recipe, amount: float) -> None:
        self.uses.append(Use(stage, group, recipe, amount))

    def skip(self, reason: str, *stages: str) -> None:
        self.unplanned += [(stage, reason) for stage in stages]

    def ask(self, stage: str, recipe: Recipe, prompts: float) -> None:
        """The teacher, or a judge, answers so many prompts."""
        config, judging = self.config, recipe.section == "judging"
        if judging and config.judge.base_url:
            self.skip(f"the judge is behind {config.judge.base_url}", stage)
        elif config.generator == "url":
            self.skip(f"written behind {config.url.base_url}", stage)
        elif config.generator == "vllm":
            self.skip("written by vLLM, whose programs are its own", stage)
        else:
            self.add(stage, "judging" if judging else "generation", recipe, prompts)

    def write(self, stage: str, prompts: float) -> None:
        """Instructions from prompts, and a response to each."""
        samples = self.config.generation.samples
        self.ask(stage, Recipe("write", "generation", samples), prompts)
        self.ask(stage, Recipe("write", "responses"), prompts * samples)

    def train(self, stage: str, rows: float, section: str = "sft") -> None:
        epochs = getattr(self.config, section).epochs
        self.add(stage, section, Recipe("train", section), rows * ASSUMED.sample * epochs)

    def score(self, stage: str, candidates: float, audited: float) -> None:
        """Influence of candidates, with the audit of the estimator by the definition."""
        settings = resolved(self.config.influence)
        method = settings.method
        defined = method == "exact" and settings.precision == "float32"
        if method != "exact":
            self.add(stage, "influence", Recipe("gradient"), 1)
        for name in AUTOMATIC if method == "auto" else (method,):
            self.add(stage, "influence", Recipe("score", name), candidates)
            candidates = 0.0  # the dearer ones of auto run where an audit fails
        if audited and not defined and method not in BASELINES:
            kind = "score" if settings.precision == "float32" else "audit"
            self.add(stage, "influence", Recipe(kind, "exact"), audited)
        if method == "less":
            self.skip("less: a gradient of each reference sample by itself, beside the rest", stage)

    def evaluate(self, *names: str, evaluations: tuple[str, ...] = ()) -> None:
        """Students by name, by the config's evaluations unless others are given."""
        config = self.config
        for stage in (f"evaluate-{name}" for name in names):
            for what in evaluations or config.evaluation.evaluations:
                if what == "reference_loss":
                    tokens = config.data.num_heldout * ASSUMED.sample
                    self.add(stage, "evaluation", Recipe("losses", "evaluation"), tokens)
                else:
                    self.skip(f"{what}: another library asks, or a judge", stage)

    def synthesise_train_evaluate(self, *names: str) -> None:
        config = self.config
        for name in names:
            self.write(f"synthesise-{name}", config.synthesis_prompts)
        if len(names) > 1:
            self.skip(ON_THE_HOST, "similarity")
        for name in names:
            self.train(f"train-{name}", config.sft.rows)
        self.evaluate("untrained", *names)


def stages_of(config: RunConfig) -> Stages:
    """The stages of the first iteration of ``config``'s method."""
    stages = Stages(config)
    METHODS[config.method](stages)
    return stages


def _montessori(stages: Stages) -> None:
    config, work = stages.config, work_of(stages.config)
    stages.write("generate", config.generation.prompts)
    stages.skip(ON_THE_HOST, "split")
    if config.signal in ("influence", "training_loss"):
        stages.train("warmup", work.warmup_tokens / ASSUMED.sample, "warmup")
    pairs, sets = 0.0, []
    prompts, samples = work.candidates / config.generation.samples, config.generation.samples
    if config.optimise != "response":
        sets.append(("", prompts, samples))
    if config.optimise in ("response", "both"):
        _respond(stages, work.candidates)
        sets.append(("-responses", work.candidates, config.competing_responses))
    for suffix, competitions, each in sets:
        SIGNALS[config.signal](stages, suffix, competitions * each)
        pairs += _pairs(config, competitions, each)
    if config.optimise == "bootstrap":
        stages.skip(ON_THE_HOST, "helpful")
        helpful = prompts if config.preferences.rule == "extremes" else work.candidates / 2
        stages.train("bootstrap", min(helpful, config.bootstrap.rows), "bootstrap")
    else:
        stages.skip(ON_THE_HOST, *(f"preferences{suffix}" for suffix, _, _ in sets))
        _tune(stages, pairs)
    names = ("untuned", "tuned") if config.compare_self_instruct else ("tuned",)
    stages.synthesise_train_evaluate(*names)
    _curves(stages, pairs, names)


def _self_reward(stages: Stages) -> None:
    config = stages.config
    stages.write("generate", config.generation.prompts)
    instructions = config.generation.prompts * config.generation.samples
    _respond(stages, instructions)
    _judge(stages, "", instructions * config.competing_responses)
    stages.skip(ON_THE_HOST, "preferences")
    _tune(stages, _pairs(config, instructions, config.competing_responses))
    names = ("untuned", "tuned") if config.compare_self_instruct else ("tuned",)
    stages.synthesise_train_evaluate(*names)


def _self_instruct(stages: Stages) -> None:
    stages.synthesise_train_evaluate("untuned")


def _no_finetuning(stages: Stages) -> None:
    stages.evaluate("untrained")


def _llm2llm(stages: Stages) -> None:
    config = stages.config
    seeds = config.llm2llm.seed_rows
    stages.train("train-seeds", seeds)
    stages.add("losses", "losses", Recipe("losses", "evaluation"), seeds * ASSUMED.sample)
    stages.write("expand", config.synthesis_prompts)
    stages.skip(ON_THE_HOST, "mix")
    stages.train("train-expanded", config.sft.rows)
    stages.evaluate("untrained", "seeds", "expanded")


METHODS = {
    "montessori": _montessori,
    "no_finetuning": _no_finetuning,
    "self_instruct": _self_instruct,
    "self_reward": _self_reward,
    "llm2llm": _llm2llm,
}


def _influence(stages: Stages, suffix: str, candidates: float) -> None:
    stages.score(f"influence{suffix}", candidates, work_of(stages.config).audited)


def _losses(stages: Stages, suffix: str, candidates: float) -> None:
    tokens = candidates * ASSUMED.sample
    stages.add(f"losses{suffix}", "losses", Recipe("losses", "warmup"), tokens)


def _judge(stages: Stages, suffix: str, candidates: float) -> None:
    recipe = Recipe("write", "judging", stages.config.judging.samples)
    stages.ask(f"judge{suffix}", recipe, candidates)


def _random(stages: Stages, suffix: str, candidates: float) -> None:
    stages.skip(ON_THE_HOST, f"random{suffix}")


SIGNALS = {
    "influence": _influence,
    "judge": _judge,
    "training_loss": _losses,
    "random": _random,
}


def _respond(stages: Stages, instructions: float) -> None:
    """The responses beside the one that an instruction came with."""
    others = stages.config.competing_responses - 1
    stages.ask("respond", Recipe("write", "responses", others), instructions)


def _tune(stages: Stages, pairs: float) -> None:
    stages.add("dpo", "dpo", Recipe("dpo"), pairs * stages.config.dpo.epochs)


def _pairs(config: RunConfig, prompts: float, each: int) -> float:
    """Of so many prompts with ``each`` candidates, of which half are assumed to help."""
    settings = config.preferences
    found = 1.0 if settings.rule == "extremes" else each * (each - 1) / 4
    return prompts * min(found, settings.max_pairs_per_prompt or found)


def _curves(stages: Stages, pairs: float, names: tuple[str, ...]) -> None:
    """Further points are further runs of the same programs."""
    config, curve = stages.config, stages.config.curve
    measured = tuple(dict.fromkeys(("reference_loss", *config.evaluation.evaluations)))
    if curve.prompts:
        steps = pairs * config.dpo.epochs / config.dpo.batch_size
        teachers = 2 + int((steps - 1) // config.dpo.keep_every)
        for step in range(teachers):
            stages.write(f"synthesise-curve-{step}", curve.prompts)
            stages.score(f"influence-curve-{step}", curve.scored, 0)
            stages.train(f"train-curve-{step}", config.sft.rows)
            stages.evaluate(f"curve-{step}", evaluations=measured)
    if curve.student_states:
        steps = config.sft.rows * config.sft.epochs / config.sft.batch_size
        for name in names:
            if any(getattr(config.sft, one) != getattr(config.warmup, one) for one in SHAPING[-3:]):
                stages.skip("the student's own states have other shapes", f"influence-along-{name}")
                continue
            for state in range(1, int(steps // curve.student_states) + 1):
                stages.score(f"influence-along-{name}-{state}", curve.scored, 0)
    if curve.prompts or curve.student_states:
        stages.skip(ON_THE_HOST, "curve")


def gathered(config: RunConfig, uses: Iterable[Use]) -> list[list[Use]]:
    """Uses of one program together, in the order in which the first of each comes."""
    found: dict[Any, list[Use]] = {}
    for use in uses:
        found.setdefault(_shape(config, use.recipe), []).append(use)
    return list(found.values())


def groups_of(uses: Iterable[Use]) -> str:
    """The groups that share a program, in one word."""
    return "+".join(dict.fromkeys(use.group for use in uses))


def _shape(config: RunConfig, recipe: Recipe) -> Any:
    """Equal for recipes whose programs have equal shapes."""
    if recipe.kind != "train":
        return recipe
    settings = getattr(config, recipe.section)
    model = config.teacher if recipe.section == "bootstrap" else config.student
    return ("train", model, *(getattr(settings, name) for name in SHAPING))
