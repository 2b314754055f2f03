"""How students are judged."""

from dataclasses import field
from typing import Literal

from pydantic.dataclasses import dataclass

from montessori_jax.config.fields import STRICT, setting
from montessori_jax.config.judging import AlpacaEvalConfig, MtBenchConfig
from montessori_jax.config.training import ATTENTION_HELP, Attention


@dataclass(frozen=True, config=STRICT)
class HarnessConfig:
    """Tasks of lm-evaluation-harness."""

    tasks: tuple[str, ...] = setting(
        ("mmlu:0", "gpqa_main_zeroshot:0", "arc_challenge:25", "gsm8k:8", "hellaswag:8"),
        "tasks or groups by name, each NAME or NAME:SHOTS",
        min_length=1,
    )
    include_path: str = setting("", "folder of task YAMLs, looked through first; empty: none")
    limit: int = setting(0, "rows of each task, the first ones; 0: all", ge=0)
    chat_template: bool = setting(False, "write prompts as turns of the model's chat template")
    max_length: int = setting(
        0, "longest input in tokens, cut on its left; 0: the model's positions", ge=0
    )
    max_gen_toks: int = setting(256, "longest text where the task sets no limit", ge=1)
    tokens_per_pass: int = setting(4096, "tokens scored on a device at one time", ge=1)
    prompts_per_batch: int = setting(8, "texts written side by side", ge=1)


@dataclass(frozen=True, config=STRICT)
class EvaluationConfig:
    """How students are judged."""

    evaluations: tuple[Literal["reference_loss", "lm_harness", "alpaca_eval", "mt_bench"], ...] = (
        setting(("reference_loss",), "what to run, by name", min_length=1)
    )
    max_length: int = setting(1024, "longest sample in tokens; the response is cut there", ge=8)
    rows_per_pass: int = setting(4, "rows on a device at one time", ge=1)
    dtype: Literal["float32", "bfloat16"] = setting("float32", "compute dtype")
    attention: Attention = setting("auto", ATTENTION_HELP)
    harness: HarnessConfig = field(default_factory=HarnessConfig)
    alpaca_eval: AlpacaEvalConfig = field(default_factory=AlpacaEvalConfig)
    mt_bench: MtBenchConfig = field(default_factory=MtBenchConfig)
