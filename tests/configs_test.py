"""Every shipped config by shape: its models are read, and its header's figures are recomputed."""

import math
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from montessori_jax.config import RunConfig, TrainingConfig, as_dict
from montessori_jax.config_file import load_run_config
from montessori_jax.models import Model
from montessori_jax.models.architecture import architecture, published_models
from montessori_jax.plan.analytic import adapter_parameters
from montessori_jax.plan.work import ASSUMED, work_of

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = {
    path.relative_to(ROOT / "configs").as_posix(): path
    for path in sorted((ROOT / "configs").rglob("*.yaml"))
    if "teacher: hf:" in path.read_text()
}
# As the makers' pages (or safetensors headers) give them.
COUNTS = {
    "hf:meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "hf:meta-llama/Meta-Llama-3-8B-Instruct": 8_030_261_248,
    "hf:TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": 1_100_048_384,
    "hf:TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "hf:mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "hf:Qwen/Qwen1.5-7B": 7_721_324_544,
    "hf:google/gemma-2-9b": 9_241_705_984,
}
# What docs/gpu.md says that the headers' durations assume.
CARDS = {"80 GB": (0.3 * 989e12, 0.5 * 3.35e12), "24 GB": (0.3 * 165e12, 0.5 * 1.008e12)}


def model(name: str) -> Model:
    """The model of a published config.json, without any weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a key that nobody knows would be warned of
        return Model(architecture(name))


def memory(named: Model, settings: TrainingConfig) -> str:
    """16 bytes for each trained parameter: itself, its gradient and two moments, in float32."""
    count = named.parameter_count()
    if not settings.lora_rank:
        return f"{count / 1e9:.2f} B parameters trained in full: {16 * count / 1e9:.1f} GB"
    assert settings.lora_base_dtype == "bfloat16"
    assert settings.lora_targets == ("all-linear",)
    trained = adapter_parameters(named, settings.lora_rank)
    return (
        f"{count / 1e9:.2f} B parameters frozen in bfloat16: {2 * count / 1e9:.1f} GB; "
        f"{trained / 1e6:.0f} M of adapters: {16 * trained / 1e9:.1f} GB"
    )


def decode_steps(config: RunConfig, prompts: int) -> int:
    """Steps of the sampler, each a token for all rows side by side, to answer ``prompts``."""
    rows = prompts * config.generation.samples
    slots = config.generation.prompts_per_batch * config.generation.samples
    steps = math.ceil(rows / slots) * ASSUMED.instruction
    return steps + math.ceil(rows / config.responses.prompts_per_batch) * ASSUMED.response


def hours(config: RunConfig, teacher: int, student: int, card: str) -> float:
    """The estimate of docs/gpu.md: arithmetic at a share of the card's peak, no waiting."""
    flops, bandwidth = CARDS[card]
    work = work_of(config)

    def write(prompts: int) -> float:
        steps = decode_steps(config, prompts)
        return steps * 2 * teacher / bandwidth + prompts * ASSUMED.prompt * 2 * teacher / flops

    def train(tokens: float, count: int, settings: TrainingConfig) -> float:
        return tokens * count * (6 if settings.lora_rank else 8) / flops

    seconds = write(config.generation.prompts)
    seconds += train(work.warmup_tokens, student, config.warmup)
    seconds += train(work.candidate_tokens, student, config.warmup)
    seconds += work.audited * work.reference_tokens * 2 * student / flops
    seconds += train(work.pair_tokens, teacher, config.dpo)
    seconds += work.pair_tokens * 2 * teacher / flops  # the reference policy
    seconds += work.students * write(config.synthesis_prompts)
    seconds += work.students * train(work.sft_tokens, student, config.sft)
    return seconds / 3600


@pytest.mark.parametrize("name", CONFIGS)
def test_the_headers_figures_follow_from_the_models_shapes(name: str):
    config = load_run_config(CONFIGS[name])
    header = CONFIGS[name].read_text().split("\n\n")[0]
    text = " ".join(line.removeprefix("#").strip() for line in header.splitlines())
    text = " ".join(text.split())
    teacher, student = model(config.teacher), model(config.student)
    for named, source in ((teacher, config.teacher), (student, config.student)):
        assert named.parameter_count() == COUNTS[source]
    assert f"teacher: {memory(teacher, config.dpo)}" in text
    assert f"student: {memory(student, config.sft)}" in text
    assert memory(student, config.warmup) == memory(student, config.sft)
    card = next(card for card in CARDS if f"one GPU with {card}" in text)
    estimate = hours(config, teacher.parameter_count(), student.parameter_count(), card)
    assert f"at least {estimate:.1f} hours an iteration by the arithmetic in docs/gpu.md" in text
    # Weights twice while text is decoded: as loaded, and laid out for one token at a time.
    written = 4 * teacher.parameter_count() / 1e9
    assert f"{written:.1f} GB while the teacher writes" in text


def test_every_student_of_the_paper_has_its_config():
    students = {load_run_config(path).student for path in CONFIGS.values()}
    assert students == COUNTS.keys() - {"hf:meta-llama/Meta-Llama-3-8B-Instruct"}


def test_published_files_are_all_used():
    assert set(published_models()) == COUNTS.keys()


MAIN = {
    "no_finetuning": ("no_finetuning", 1),
    "self_instruct": ("self_instruct", 1),
    "self_instruct_gpt4o": ("self_instruct", 1),
    "self_reward_1": ("self_reward", 1),
    "self_reward_2": ("self_reward", 2),
    "self_reward_gpt4o_1": ("self_reward", 1),
    "self_reward_gpt4o_2": ("self_reward", 2),
    "llm2llm_1": ("llm2llm", 1),
    "llm2llm_2": ("llm2llm", 2),
    "montessori_1": ("montessori", 1),
    "montessori_2": ("montessori", 2),
    "montessori_3": ("montessori", 3),  # of figure 4
}
ABLATIONS = {
    "signal_judge": {"signal": "judge"},
    "signal_training_loss": {"signal": "training_loss"},
    "signal_random": {"signal": "random"},
    "signal_influence_extremes": {},
    "optimise_response": {"optimise": "response"},
    "optimise_both": {"optimise": "both"},
    "optimise_bootstrap": {"optimise": "bootstrap"},
    "seeds_out_of_domain": {},
    "seeds_test": {},
}
# Alpaca-GPT4 is in domain, for all others; AlpacaEval's file is downloaded by its user.
SEEDS = {
    "seeds_out_of_domain": "hf:OpenAssistant/oasst1",
    "seeds_test": "alpaca_eval.json",
}
# What may differ from row to row of one table.
OWN = {"run_dir", "method", "iterations", "teacher", "generator", "signal", "optimise", "url",
       "judge", "judging", "preferences", "llm2llm", "bootstrap", "compare_self_instruct",
       "synthesis_prompts", "data"}  # fmt: skip


def rows_of(folder: str) -> dict[str, RunConfig]:
    """The configs of a table's rows, by name; each header has the command that runs it."""
    found = {}
    for path in sorted((ROOT / "configs/paper" / folder).glob("*.yaml")):
        header = path.read_text().split("\n\n")[0]
        assert f"montessori run {path.relative_to(ROOT).as_posix()}" in header
        assert all(word in header for word in ("Hardware", "Duration", "Expect"))
        found[path.stem] = load_run_config(path)
    return found


@pytest.mark.parametrize("student", ["llama3_8b", "tinyllama_1b"])
def test_every_row_of_the_main_table_has_its_config(student: str):
    rows, base = rows_of(f"main/{student}"), load_run_config(CONFIGS[f"paper/{student}.yaml"])
    assert {name: (row.method, row.iterations) for name, row in rows.items()} == MAIN
    same = as_dict(base).keys() - OWN
    for name, row in rows.items():
        assert {key: as_dict(row)[key] for key in same} == {key: as_dict(base)[key] for key in same}
        assert row.data == base.data
        assert row.run_dir.endswith(name.rstrip("123").removesuffix("_"))
        starred = "gpt4o" in name
        assert starred == ("gpt-4o" in (row.url.prices | row.judge.prices))
        assert starred == (row.generator == "url" or bool(row.judge.base_url))
    # A second iteration goes on in the directory of the first.
    for name in ("self_reward", "self_reward_gpt4o", "llm2llm", "montessori"):
        assert replace(rows[f"{name}_2"], iterations=1) == rows[f"{name}_1"]
    assert replace(rows["montessori_3"], iterations=1) == rows["montessori_1"]


def test_every_row_of_the_ablations_has_its_config():
    rows = rows_of("ablations")
    plain = rows_of("main/llama3_8b")["montessori_1"]
    assert rows.keys() == ABLATIONS.keys()
    for name, row in rows.items():
        expected = {"signal": "influence", "optimise": "instruction", **ABLATIONS[name]}
        assert {"signal": row.signal, "optimise": row.optimise} == expected
        assert row.data.seeds == SEEDS.get(name, "hf:vicgalle/alpaca-gpt4")
        assert replace(row.data, seeds=plain.data.seeds) == plain.data
        assert row.run_dir.endswith(f"ablations/{name}")
        same = as_dict(plain).keys() - OWN
        assert all(as_dict(row)[key] == as_dict(plain)[key] for key in same)
    assert {name for name in rows if name.startswith("seeds_")} == SEEDS.keys()
    # What headers and docs/methods.md say of the teachers' budgets, 78% of candidates kept.
    probed = round((1 - plain.warmup_fraction) * plain.generation.prompts)
    rows_of_all = 0.78 * plain.generation.prompts * plain.generation.samples
    assert (probed, plain.preferences.rule) == (2250, "sign")
    assert 0.78 * probed * plain.generation.samples == pytest.approx(7000, rel=0.01)
    assert rows_of_all == pytest.approx(9400, rel=0.01)
    assert (plain.generation.samples // 2) ** 2 == 4 == plain.competing_responses
    tuned = rows["optimise_bootstrap"]
    assert tuned.bootstrap.lora_rank == tuned.dpo.lora_rank


def test_the_figures_along_training_have_their_config():
    curve = rows_of("figures")["teacher_curve"]
    plain = rows_of("main/llama3_8b")["montessori_1"]
    assert curve.dpo.keep_every > 0
    assert curve.curve.prompts > 0
    assert curve.curve.student_states > 0
    changed = {"run_dir": curve.run_dir, "compare_self_instruct": True, "curve": curve.curve}
    assert replace(plain, dpo=replace(plain.dpo, keep_every=500), **changed) == curve
    # As the header counts: 5% of the paper's pairs are held out, 78% of candidates remain.
    steps = math.ceil(6792 * (1 - curve.preferences.heldout_fraction) / curve.dpo.batch_size)
    kept = list(range(curve.dpo.keep_every, steps, curve.dpo.keep_every))
    assert (len(kept), len([0, *kept, steps])) == (6, 8)
    rows = 0.78 * curve.curve.prompts * curve.generation.samples
    assert rows == pytest.approx(2500, rel=0.01)
    assert 8 * rows == pytest.approx(2 * curve.sft.rows, rel=0.01)
    assert math.ceil(curve.sft.rows / curve.sft.batch_size) == 313
