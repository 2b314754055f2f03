"""How students answer benchmarks' prompts, and how a judge grades what they answered."""

from dataclasses import field

from pydantic.dataclasses import dataclass

from montessori_jax.config.fields import STRICT, setting
from montessori_jax.config.generation import SamplingConfig

BASELINE_HELP = "a file of answers (.jsonl, .json, .parquet), a model, or RUN[:iteration[:student]]"


@dataclass(frozen=True, config=STRICT)
class AnswerConfig(SamplingConfig):
    """How a student's answers are drawn."""

    temperature: float = setting(0.0, "0 is greedy", ge=0)


@dataclass(frozen=True, config=STRICT)
class AlpacaEvalConfig:
    """AlpacaEval 2, by the `alpaca_eval` library."""

    prompts: str = setting(
        "hf:tatsu-lab/alpaca_eval", "the 805 prompts: .json, .jsonl or this name; in their order"
    )
    num_prompts: int = setting(0, "prompts used, the first ones; 0: all", ge=0)
    baseline: str = setting(
        "self_instruct",
        "whom to beat: self_instruct (the run's student of the untuned teacher), outputs (those "
        f"in the prompts' file), {BASELINE_HELP}",
    )
    annotator: str = setting(
        "auto",
        "the library's judge prompt and parser, by its name there; auto: its default, or, where "
        "the judge gives no log-probs, one without",
    )
    length_table: str = setting(
        "", "the library's df_gamed.csv for the length-controlled rate; empty: from the hub"
    )
    answers: AnswerConfig = field(default_factory=AnswerConfig)


@dataclass(frozen=True, config=STRICT)
class MtBenchConfig:
    """MT-Bench: 80 questions of two turns. Answers have the temperature of their category."""

    questions: str = setting("", "FastChat's question.jsonl")
    judge_prompts: str = setting("", "FastChat's judge_prompts.jsonl")
    references: str = setting(
        "",
        "FastChat's reference_answer/gpt-4.jsonl, reference answers for math, reasoning and "
        "coding; empty: those in the questions' file",
    )
    num_questions: int = setting(0, "questions used, the first ones; 0: all", ge=0)
    baseline: str = setting("", "also pairwise against: a model, or RUN[:iteration[:student]]")
    judge_tokens: int = setting(2048, "longest judgement, in tokens", ge=1)
    answers: AnswerConfig = field(default_factory=AnswerConfig)


@dataclass(frozen=True, config=STRICT)
class HeadToHeadConfig:
    """Answers of several models to the same prompts, each pair compared in both orders."""

    prompts: str = setting("package:heldout", "rows whose instructions are answered")
    num_prompts: int = setting(0, "prompts used, the first ones; 0: all", ge=0)
    judge_prompts: str = setting(
        "", "FastChat's judge_prompts.jsonl, whose pair-v2 is asked; empty: words of our own"
    )
    judge_tokens: int = setting(1024, "longest judgement, in tokens", ge=1)
    answers: AnswerConfig = field(default_factory=AnswerConfig)
