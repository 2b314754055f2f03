"""Every shipped config by shape: its models are read, and its header's figures are recomputed."""

import json
import math
import warnings
from pathlib import Path

import jax
import pytest

from montessori_jax.config import RunConfig, TrainingConfig
from montessori_jax.config_file import load_run_config
from montessori_jax.models import Model
from montessori_jax.models.families import family_of

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = Path(__file__).parent / "models" / "published"
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
PROMPT, INSTRUCTION, RESPONSE = 1000, 60, 300


def model(name: str) -> Model:
    """The model of a published config.json, without any weights."""
    file = PUBLISHED / f"{name.removeprefix('hf:').replace('/', '--')}.json"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a key that nobody knows would be warned of
        return Model(family_of(json.loads(file.read_text()), name))


def adapters(named: Model, rank: int) -> int:
    """Parameters of adapters on all linear layers but the head: ``rank (in + out)`` each."""
    leaves = jax.tree_util.tree_leaves_with_path(named.shapes()["layers"])
    return sum(
        leaf.shape[0] * rank * (leaf.shape[1] + leaf.shape[2])
        for path, leaf in leaves
        if path[-1].key == "kernel"
    )


def memory(named: Model, settings: TrainingConfig) -> str:
    """16 bytes for each trained parameter: itself, its gradient and two moments, in float32."""
    count = named.parameter_count()
    if not settings.lora_rank:
        return f"{count / 1e9:.2f} B parameters trained in full: {16 * count / 1e9:.1f} GB"
    assert settings.lora_base_dtype == "bfloat16"
    assert settings.lora_targets == ("all-linear",)
    trained = adapters(named, settings.lora_rank)
    return (
        f"{count / 1e9:.2f} B parameters frozen in bfloat16: {2 * count / 1e9:.1f} GB; "
        f"{trained / 1e6:.0f} M of adapters: {16 * trained / 1e9:.1f} GB"
    )


def hours(config: RunConfig, teacher: int, student: int, card: str) -> float:
    """The estimate of docs/gpu.md: arithmetic at a share of the card's peak, no waiting."""
    flops, bandwidth = CARDS[card]

    def write(prompts: int) -> float:
        rows = prompts * config.generation.samples
        slots = config.generation.prompts_per_batch * config.generation.samples
        steps = math.ceil(rows / slots) * INSTRUCTION
        steps += math.ceil(rows / config.responses.prompts_per_batch) * RESPONSE
        return steps * 2 * teacher / bandwidth + prompts * PROMPT * 2 * teacher / flops

    def train(tokens: float, count: int, settings: TrainingConfig) -> float:
        return tokens * count * (6 if settings.lora_rank else 8) / flops

    sample = INSTRUCTION + RESPONSE
    probed = config.generation.prompts * (1 - config.warmup_fraction)
    warm = config.generation.prompts * config.warmup_fraction * config.generation.samples
    pairs = probed * config.generation.samples * (config.generation.samples - 1) / 4
    students = 2 if config.compare_self_instruct else 1
    seconds = write(config.generation.prompts)
    seconds += train(min(warm, config.warmup.rows) * sample, student, config.warmup)
    seconds += train(probed * config.generation.samples * sample, student, config.warmup)
    seconds += config.influence.audit * config.data.num_reference * sample * 2 * student / flops
    seconds += train(pairs * 2 * (PROMPT + INSTRUCTION), teacher, config.dpo)
    seconds += pairs * 2 * (PROMPT + INSTRUCTION) * 2 * teacher / flops  # the reference policy
    seconds += students * write(config.synthesis_prompts)
    seconds += students * train(config.sft.rows * sample, student, config.sft)
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
    named = {f"{name.removeprefix('hf:').replace('/', '--')}.json" for name in COUNTS}
    assert {file.name for file in PUBLISHED.iterdir()} == named
