"""Stages with LoRA on a tiny model: what they write, what influence opens, what is refused."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from montessori_jax.config import DpoConfig, InfluenceConfig, SftConfig, WarmupConfig
from montessori_jax.costs import Meter
from montessori_jax.errors import Interrupted, UserError
from montessori_jax.models.adapter_folder import load_adapter
from montessori_jax.models.lora import LoraModel, merge
from montessori_jax.models.sources import load_model
from montessori_jax.stages.dpo import dpo, kept_teacher
from montessori_jax.stages.finetune import finetune, kept_state, warm_up
from montessori_jax.stages.influence import influence
from montessori_jax.stages.student import open_student
from montessori_jax.stopping import Stop
from montessori_jax.work import Work
from tests.models import tiny

CHATML = (
    "{% for m in messages %}{{ ('w4 ' if m['role'] == 'assistant' else 'w3 ') + m['content'] + "
    "' w2 ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'w4 ' }}{% endif %}"
)
LORA = {"lora_rank": 2, "lora_alpha": 4.0, "learning_rate": 1e-2, "max_length": 32}
SFT = {
    **LORA,
    "rows": 6,
    "batch_size": 2,
    "checkpoint_every": 1,
    "warmup_ratio": 0.0,
    "remat": "none",
}


def words(random: np.random.Generator, count: int) -> str:
    return " ".join(f"w{random.integers(5, 61)}" for _ in range(count))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a chat template, rows, and pairs."""
    folder = tmp_path_factory.mktemp("world")
    tiny.torch_model({**tiny.CONFIG, "num_hidden_layers": 2}).save_pretrained(folder / "model")
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder / "model")
    random = np.random.default_rng(0)
    rows = [{"instruction": words(random, 3), "response": words(random, 4)} for _ in range(6)]
    pairs = [
        {"prompt": words(random, 3), "chosen": words(random, 4), "rejected": words(random, 4)}
        for _ in range(4)
    ]
    for name, table in (("rows", rows), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    return folder


def work(folder: Path, stop: Stop | None = None) -> Work:
    folder.mkdir(parents=True, exist_ok=True)
    return Work(folder, 1, Meter(None, "test"), stop or Stop(), lambda text: None, True)


class StopAfter(Stop):
    """Asks for a stop at the ``count``-th question."""

    def __init__(self, count: int):
        super().__init__()
        self.left = count

    def requested(self) -> bool:
        self.left -= 1
        return self.left <= 0


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "checkpoint" not in str(path) and path.name != "metrics.jsonl"
    }


def test_finetune_writes_the_merged_model_and_the_adapter(world: Path, tmp_path: Path) -> None:
    name, data = str(world / "model"), str(world / "rows.jsonl")
    settings = SftConfig(**SFT, lora_targets=("q_proj", "up_proj"))
    finetune(load_model(name), data, settings, work(tmp_path / "whole"))
    base = load_model(name)
    spec, adapter = load_adapter(tmp_path / "whole/adapter", base.model)
    assert (spec.rank, spec.targets) == (2, ("q_proj", "up_proj"))
    merged = load_model(str(tmp_path / "whole/student"))
    jax.tree.map(np.testing.assert_array_equal, merged.params, merge(base.params, adapter, spec))
    again = load_model(str(tmp_path / "whole/adapter"))  # its config names the base
    jax.tree.map(np.testing.assert_array_equal, merged.params, again.params)
    moved = np.abs(np.asarray(adapter["layers"]["mlp"]["up"]["lora_b"])).max()
    assert moved > 1e-3


@pytest.mark.slow  # its small form: an interrupted train_sft in tests/training/lora_test.py
def test_a_stopped_finetune_ends_with_the_same_files(world: Path, tmp_path: Path) -> None:
    name, data = str(world / "model"), str(world / "rows.jsonl")
    settings = SftConfig(**SFT, lora_targets=("q_proj", "up_proj"))
    finetune(load_model(name), data, settings, work(tmp_path / "whole"))
    with pytest.raises(Interrupted):
        finetune(load_model(name), data, settings, work(tmp_path / "parts", StopAfter(1)))
    finetune(load_model(name), data, settings, work(tmp_path / "parts"))
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_influence_continues_the_warm_ups_adapter(world: Path, tmp_path: Path) -> None:
    name, data = str(world / "model"), str(world / "rows.jsonl")
    settings = WarmupConfig(**{**SFT, "warmup_ratio": 1.0}, lora_base_dtype="bfloat16")
    warm_up(load_model(name, dtype="bfloat16"), data, settings, work(tmp_path / "warm"))
    probe = open_student(str(tmp_path / "warm"), InfluenceConfig())
    assert isinstance(probe.loaded.model, LoraModel)
    assert probe.loaded.model.spec.rank == 2
    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(probe.loaded.model.base)}
    assert dtypes == {"bfloat16"}
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(probe.state.params)} == {"float32"}
    sizes = {leaf.size for leaf in jax.tree.leaves(probe.state.opt_state)}
    assert max(sizes) == max(leaf.size for leaf in jax.tree.leaves(probe.state.params))


@pytest.mark.slow  # its small form: tests/influence/lora_test.py
def test_influence_scores_with_the_adapter(world: Path, tmp_path: Path) -> None:
    name, data = str(world / "model"), str(world / "rows.jsonl")
    settings = WarmupConfig(**{**SFT, "warmup_ratio": 1.0})
    warm_up(load_model(name), data, settings, work(tmp_path / "warm"))
    scores = {}
    for method in ("exact", "first_order"):
        out = tmp_path / f"{method}.jsonl"
        result = influence(
            str(tmp_path / "warm"),
            data,
            data,
            InfluenceConfig(method=method, max_length=32),
            work(tmp_path / method),
            out=out,
        )
        assert result["scored"] == 6
        scores[method] = [json.loads(line)["influence"] for line in out.read_text().splitlines()]
    assert np.corrcoef(scores["exact"], scores["first_order"])[0, 1] > 0.9


@pytest.mark.slow  # its small form: train_dpo in tests/training/lora_test.py
def test_dpo_writes_a_teacher_and_its_adapter(world: Path, tmp_path: Path) -> None:
    settings = DpoConfig(**LORA, warmup_ratio=0.0, remat="none")
    teacher = load_model(str(world / "model"))
    before = jax.device_get(teacher.params["layers"]["attention"]["key"]["kernel"])
    pairs = str(world / "pairs.jsonl")
    result = dpo(teacher, pairs, settings, work(tmp_path), heldout=pairs)
    np.testing.assert_allclose(result["first_loss"], np.log(2), rtol=1e-6)
    assert result["heldout_before"]["reward_margin"] == 0
    assert result["heldout_after"]["reward_margin"] > 0
    tuned = load_model(str(tmp_path / "teacher"))
    assert not np.array_equal(tuned.params["layers"]["attention"]["key"]["kernel"], before)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_a_target_that_matches_nothing_is_one_line(world: Path, tmp_path: Path) -> None:
    settings = SftConfig(**SFT, lora_targets=("c_attn",))
    student = load_model(str(world / "model"))
    with pytest.raises(UserError, match="LoRA target 'c_attn' is no linear layer"):
        finetune(student, str(world / "rows.jsonl"), settings, work(tmp_path))


def test_what_is_kept_along_the_way(world: Path, tmp_path: Path):
    """Teachers of DPO's steps and states of a student's are those of a run that ended there."""
    teacher = load_model(str(world / "model"))
    # No decay, so that a shorter run takes the same steps.
    flat = {"max_length": 32, "remat": "none", "warmup_ratio": 0.0, "decay_ratio": 0.0}
    rule = {**flat, "batch_size": 2, "micro_batch": 2, "learning_rate": 1e-2}
    settings = DpoConfig(**rule, epochs=2, keep_every=1)
    result = dpo(teacher, str(world / "pairs.jsonl"), settings, work(tmp_path / "long"))
    assert result["steps"] == 4
    kept = [kept_teacher(tmp_path / "long", step) for step in (1, 2, 3, 4)]
    short = DpoConfig(**rule, epochs=1)
    teacher = load_model(str(world / "model"))
    assert dpo(teacher, str(world / "pairs.jsonl"), short, work(tmp_path / "short"))["steps"] == 2
    weights = [(one / "model.safetensors").read_bytes() for one in kept]
    assert weights[1] == (tmp_path / "short" / "teacher" / "model.safetensors").read_bytes()
    assert weights[3] == (tmp_path / "long" / "teacher" / "model.safetensors").read_bytes()
    assert len(set(weights)) == 4

    student = load_model(str(world / "model"))
    sft = SftConfig(**{**rule, "rows": 6})
    finetune(student, str(world / "rows.jsonl"), sft, work(tmp_path / "sft"), states=2)
    assert [one.name for one in kept_state(tmp_path / "sft", 2).parent.iterdir()] == ["step-2"]
    opened = open_student(str(kept_state(tmp_path / "sft", 2)), InfluenceConfig())
    assert opened.warm
    assert int(opened.state.step) == 2
    assert opened.learning_rate == 1e-2
