"""New weights on a running server: each way of handing them over, and the probe that checks it."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from montessori_jax.config import DpoConfig, SamplingConfig, VllmConfig
from montessori_jax.data.chat import ChatFormat
from montessori_jax.errors import UserError
from montessori_jax.generation.prompts import build_instruction_prompt
from montessori_jax.generation.sampler import JaxSampler
from montessori_jax.generation.teacher import Teacher
from montessori_jax.models.adapter_folder import save_adapter
from montessori_jax.models.folder import load_folder, save_folder
from montessori_jax.models.loaded import LoadedModel
from montessori_jax.models.lora import LoraModel, LoraSpec, adapter_shapes
from montessori_jax.models.sources import model_fingerprint
from montessori_jax.serving.probe import FILE, ProbeText, read_probe, write_probe
from montessori_jax.serving.teachers import VllmTeachers
from montessori_jax.stages.generate import as_request
from montessori_jax.stages.probe import greedy_texts, probe_texts
from montessori_jax.training.pairs import EncodedPair
from montessori_jax.training.reference_log_probs import pair_log_probs
from tests.serving.conftest import SETTINGS, open_vllm

GREEDY = SamplingConfig(temperature=0.0, max_tokens=16, dtype="float32")
TASKS = ("Name three rivers.", "Explain the tides.", "Write a poem.", "Add 3 and 4.")


def noisy(params, scale: float, seed: int):
    """Parameters with noise of ``scale`` times each leaf's spread."""
    leaves, shape = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [
        leaf + scale * leaf.std() * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(shape, moved)


def probe_of(old: LoadedModel, model, params) -> list[ProbeText]:
    """The probe that a DPO stage would leave after tuning ``old`` into ``model`` of ``params``."""
    chat = ChatFormat.of(old)
    pairs = []
    for task in TASKS:
        prompt = build_instruction_prompt("turns", [task])
        answer = chat.encode_answer(prompt.messages, "x", prefill=prompt.prefill)
        pairs.append(EncodedPair(task, answer, answer))
    texts = greedy_texts(old, pairs)
    settings = DpoConfig()
    before = pair_log_probs(old.model, old.params, texts, settings)
    return probe_texts(texts, before, pair_log_probs(model, params, texts, settings))


def export(folder: Path, old: LoadedModel, model, params, probe_params=None) -> str:
    """A tuned teacher's folder with its probe; ``probe_params`` makes the probe another's."""
    save_folder(folder / "teacher", old.model, params, old.tokenizer, old.generation)
    texts = probe_of(old, model, params if probe_params is None else probe_params)
    write_probe(folder, model_fingerprint(str(folder / "teacher")), texts)
    return str(folder / "teacher")


@pytest.fixture(scope="module")
def tuned(tiny, tmp_path_factory) -> str:
    params = noisy(tiny.params, 0.3, seed=1)
    return export(tmp_path_factory.mktemp("tuned"), tiny, tiny.model, params)


@pytest.fixture(scope="module")
def adapted(tiny, tiny_folder, tmp_path_factory) -> str:
    """A teacher tuned by LoRA: merged, with the adapter beside it, as the DPO stage leaves both."""
    folder = tmp_path_factory.mktemp("adapted")
    spec = LoraSpec(4, 16.0)
    noise = iter(jax.random.split(jax.random.key(2), 100))
    adapter = jax.tree.map(
        lambda leaf: 0.1 * jax.random.normal(next(noise), leaf.shape),
        adapter_shapes(tiny.model, spec),
    )
    save_adapter(folder / "adapter", tiny.model, adapter, spec, base=str(tiny_folder))
    model = LoraModel(tiny.model.config, tiny.params, spec)
    return export(folder, tiny, tiny.model, model.merged(adapter))


@pytest.fixture(scope="module")
def teachers(vllm, tmp_path_factory) -> Iterator[VllmTeachers]:
    made = open_vllm(tmp_path_factory.mktemp("vllm"), lora_rank=4)
    yield made
    made.close()


def written(teacher: Teacher) -> dict[str, tuple[int, ...]]:
    prompts = [build_instruction_prompt("turns", [task]) for task in TASKS]
    requests = [as_request(teacher, str(i), prompt, i) for i, prompt in enumerate(prompts)]
    made = teacher.generator.generate(requests, GREEDY, samples=1, stop=(), seed=0)
    return {one.prompt_id: one.tokens for (one,) in made}


def ours(folder: str) -> dict[str, tuple[int, ...]]:
    loaded = load_folder(folder)
    chat = ChatFormat.of(loaded)
    sampler = JaxSampler(loaded.model, loaded.params, chat)
    teacher = Teacher(folder, "", sampler, "jax", chat, 1024, 0, lambda dtype: dtype)
    return written(teacher)


def test_a_running_server_takes_new_weights_and_old_ones_again(
    teachers, tiny_folder, tuned, adapted, capsys
):
    steps = [
        (str(tiny_folder), "start"),
        (tuned, "reload"),
        (str(tiny_folder), "reload"),
        (adapted, "adapter"),
        (str(tiny_folder), "same"),
        (str(tiny_folder), "same"),
        (tuned, "reload"),
    ]
    expected = {folder: ours(folder) for folder, _ in steps}
    assert len({str(texts) for texts in expected.values()}) == 3
    for folder, how in steps:
        texts = written(teachers.teacher(folder))
        assert (teachers.handovers[-1], texts) == (how, expected[folder])
    assert teachers._own().starts == 1
    said = capsys.readouterr().out
    assert said.count("probe of 64 tokens: vLLM is ") == 3


def test_a_lost_server_comes_back_with_the_adapter_that_it_had(teachers, tiny_folder, adapted):
    teachers.teacher(str(tiny_folder))
    teacher = teachers.teacher(adapted)
    assert teachers.handovers[-1] == "adapter"
    server = teacher.generator.server
    before = written(teacher)
    server.sidecar.end()
    assert server.gone()
    assert written(teacher) == before
    assert server.adapter is not None
    assert not server.gone()


def test_a_server_with_other_weights_stops_the_run_with_both_numbers(
    teachers, tiny, tiny_folder, tuned, tmp_path
):
    wrong = noisy(tiny.params, 0.3, seed=9)
    other = noisy(tiny.params, 0.3, seed=8)
    place = export(tmp_path / "wrong", tiny, tiny.model, wrong, probe_params=other)
    with pytest.raises(UserError) as raised:
        teachers.teacher(place)
    text = str(raised.value)
    assert f"vLLM does not serve {place}: mean log-prob of 64 tokens is" in text
    assert "by the trainer" in text
    # Weights that moved less than dtypes explain, on a server that still has the old ones.
    near = noisy(tiny.params, 3e-3, seed=7)
    save_folder(tmp_path / "old" / "teacher", tiny.model, tiny.params, tiny.tokenizer,
                tiny.generation)  # fmt: skip
    texts = probe_of(tiny, tiny.model, near)
    moved = np.abs(np.subtract([t.after for t in texts], [t.before for t in texts])).mean()
    assert 1e-3 < moved < 1e-2
    stale = str(tmp_path / "old" / "teacher")
    write_probe(tmp_path / "old", model_fingerprint(stale), texts)
    with pytest.raises(UserError, match="nats a token apart"):
        teachers.teacher(stale)


def test_a_probe_of_another_model_or_a_broken_one_is_none(tuned, tmp_path):
    fingerprint = model_fingerprint(tuned)
    assert len(read_probe(Path(tuned).parent, fingerprint)) == 4
    assert read_probe(Path(tuned).parent, "other") == []
    assert read_probe(tmp_path, fingerprint) == []
    (tmp_path / FILE).write_text('{"model": 3')
    assert read_probe(tmp_path, fingerprint) == []


def test_a_running_server_is_used_reloaded_and_never_ended(
    teachers, tiny_folder, tuned, monkeypatch, capsys, tmp_path
):
    teachers.teacher(str(tiny_folder))
    own = teachers._own()
    monkeypatch.setenv("TEST_KEY", own.key)
    settings = replace(SETTINGS, url=own.url, api_key_env="TEST_KEY", dtype="float32")
    guest = open_vllm(tmp_path, settings)
    assert written(guest.teacher(str(tiny_folder))) == ours(str(tiny_folder))
    assert written(guest.teacher(tuned)) == ours(tuned)
    assert guest.handovers == ["same", "reload"]
    guest.close()
    assert not own.gone()
    # What it serves now is not what its owner believes.
    own.restart(tiny_folder, str(tiny_folder))


def test_addresses_that_are_no_vllm_are_said(teachers, tiny_folder, monkeypatch, tmp_path):
    nobody = open_vllm(tmp_path, VllmConfig(url="http://127.0.0.1:9"))
    with pytest.raises(UserError, match=r"no server answers there .ConnectError."):
        nobody.teacher(str(tiny_folder))
    teachers.teacher(str(tiny_folder))
    url = teachers._own().url
    monkeypatch.setenv("TEST_KEY", "wrong")
    stranger = open_vllm(tmp_path, VllmConfig(url=url, api_key_env="TEST_KEY"))
    with pytest.raises(UserError, match="the server refuses the key: set TEST_KEY"):
        stranger.check(str(tiny_folder))


def test_without_reload_there_is_a_restart(teachers, tiny_folder, tuned):
    teachers.teacher(str(tiny_folder))
    own, settings = teachers._own(), teachers.settings
    starts = own.starts
    teachers.settings = replace(settings, handover="restart")
    try:
        assert written(teachers.teacher(tuned)) == ours(tuned)
        assert teachers.handovers[-1] == "restart"
        assert own.starts == starts + 1
        teachers.release()
        assert not own.gone(), "on a CPU it stays up between stages"
        teachers.settings = replace(settings, stay_up="never")
        teachers.release()
        assert own.gone()
    finally:
        teachers.settings = settings
