"""New weights on a running server: each way of handing them over, and the probe that checks it."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from montessori_jax.config import DpoConfig, SamplingConfig
from montessori_jax.data.chat import ChatFormat
from montessori_jax.errors import UserError
from montessori_jax.generation.prompts import build_instruction_prompt
from montessori_jax.generation.sampler import JaxSampler
from montessori_jax.generation.teacher import Teacher
from montessori_jax.models import Model
from montessori_jax.models.adapter_folder import save_adapter
from montessori_jax.models.folder import load_folder, save_folder
from montessori_jax.models.loaded import LoadedModel
from montessori_jax.models.lora import LoraModel, LoraSpec, adapter_shapes
from montessori_jax.models.sources import model_fingerprint
from montessori_jax.serving.probe import FILE, TOLERANCE, VISIBLE, Probes, ProbeText, write_probe
from montessori_jax.serving.vllm_teachers import RunningVllmTeachers, VllmTeachers
from montessori_jax.stages.probe import greedy_texts, probe_texts
from montessori_jax.stages.sample import as_request
from montessori_jax.stopping import Stop
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
    write_probe(folder, model_fingerprint(str(folder / "teacher")), old.fingerprint, texts)
    return str(folder / "teacher")


@pytest.fixture(scope="module")
def base(tiny, tmp_path_factory) -> LoadedModel:
    """The tiny teacher with a head of its own: vLLM on a CPU cannot reload tied embeddings."""
    folder = tmp_path_factory.mktemp("base") / "teacher"
    config = replace(tiny.model.config, tie_word_embeddings=False)
    params = {**tiny.params, "head": {"kernel": tiny.params["embed"]["embedding"].T}}
    save_folder(folder, Model(config), params, tiny.tokenizer, tiny.generation)
    return load_folder(folder)


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory) -> str:
    params = noisy(base.params, 0.3, seed=1)
    return export(tmp_path_factory.mktemp("tuned"), base, base.model, params)


@pytest.fixture(scope="module")
def adapted(base, tmp_path_factory) -> str:
    """A teacher tuned by LoRA: merged, with the adapter beside it, as the DPO stage leaves both."""
    folder = tmp_path_factory.mktemp("adapted")
    spec = LoraSpec(4, 16.0)
    noise = iter(jax.random.split(jax.random.key(2), 100))
    adapter = jax.tree.map(
        lambda leaf: 0.1 * jax.random.normal(next(noise), leaf.shape),
        adapter_shapes(base.model, spec),
    )
    save_adapter(folder / "adapter", base.model, adapter, spec, base=base.name)
    model = LoraModel(base.model.config, base.params, spec)
    return export(folder, base, base.model, model.merged(adapter))


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
    teachers, base, tuned, adapted, capsys
):
    steps = [
        (base.name, "start"),
        (tuned, "reload"),
        (base.name, "reload"),
        (adapted, "adapter"),
        (base.name, "same"),
        (base.name, "same"),
        (tuned, "reload"),
    ]
    expected = {folder: ours(folder) for folder, _ in steps}
    assert len({str(texts) for texts in expected.values()}) == 3
    for folder, how in steps:
        texts = written(teachers.teacher(folder))
        assert (teachers.handovers[-1], texts) == (how, expected[folder])
    assert teachers.server.starts == 1
    # All but the first: what a tuned model's probe says of its base serves the base.
    assert capsys.readouterr().out.count("probe of ") == 6


def test_a_lost_server_comes_back_with_the_adapter_that_it_had(teachers, base, adapted):
    teachers.teacher(base.name)
    teacher = teachers.teacher(adapted)
    assert teachers.handovers[-1] == "adapter"
    server = teacher.generator.server
    before = written(teacher)
    server.sidecar.end()
    assert server.gone()
    assert written(teacher) == before
    assert server.adapter is not None
    assert not server.gone()
    # Whoever asks for the base after a loss gets the base.
    server.sidecar.end()
    assert written(teachers.teacher(base.name)) == ours(base.name)
    assert teachers.handovers[-1] == "start"


@pytest.fixture
def guest(teachers, base, monkeypatch) -> Iterator[RunningVllmTeachers]:
    """Who uses the same server by its address; it has the base's weights again afterwards."""
    teachers.teacher(base.name)
    server = teachers.server
    monkeypatch.setenv("TEST_KEY", server.key)
    settings = replace(SETTINGS, url=server.url, api_key_env="TEST_KEY", dtype="float32")
    made = RunningVllmTeachers(settings, say=print, stop=Stop())
    yield made
    assert server.reload(Path(base.name), base.name)


def test_a_server_with_other_weights_stops_the_run_with_both_numbers(guest, base, tmp_path):
    wrong, other = (noisy(base.params, 0.3, seed) for seed in (9, 8))
    place = export(tmp_path / "wrong", base, base.model, wrong, probe_params=other)
    with pytest.raises(UserError) as raised:
        guest.teacher(place)
    text = str(raised.value)
    assert f"vLLM does not serve {place}: mean log-prob of" in text
    assert "by the trainer" in text
    assert not guest.handovers


def test_old_weights_are_told_from_new_ones_that_moved_less_than_rounding_may(
    guest, base, tmp_path
):
    near = noisy(base.params, 3e-3, seed=7)
    save_folder(tmp_path / "teacher", base.model, base.params, base.tokenizer, base.generation)
    texts = probe_of(base, base.model, near)
    moved = np.abs(
        np.concatenate([one.after for one in texts]) - np.concatenate([one.before for one in texts])
    )
    assert VISIBLE["float32"] < moved.mean() < TOLERANCE["float32"]
    stale = str(tmp_path / "teacher")
    write_probe(tmp_path, model_fingerprint(stale), "another", texts)
    with pytest.raises(UserError, match="nats a token apart"):
        guest.teacher(stale)


@pytest.mark.slow
def test_what_a_cpu_cannot_reload_is_restarted_and_forced_it_is_noticed(
    teachers, tiny, tiny_folder, tmp_path, monkeypatch
):
    """vLLM 0.32 packs a CPU's weights, and packs tied embeddings' head once."""
    moved = noisy(tiny.params, 0.3, seed=3)
    tuned = export(tmp_path, tiny, tiny.model, moved)
    teachers.teacher(str(tiny_folder))
    server = teachers.server
    monkeypatch.setenv("TEST_KEY", server.key)
    settings = replace(SETTINGS, url=server.url, api_key_env="TEST_KEY", dtype="float32")
    with pytest.raises(UserError, match=r"vLLM does not serve .* nats a token apart"):
        RunningVllmTeachers(settings, say=print, stop=Stop()).teacher(tuned)
    assert written(teachers.teacher(tuned)) == ours(tuned)
    assert teachers.handovers[-1] == "restart"


def test_a_probe_of_another_model_or_a_broken_one_is_none(tuned, tmp_path):
    fingerprint = model_fingerprint(tuned)
    assert len(Probes().of(Path(tuned).parent, fingerprint)) == 4
    assert Probes().of(Path(tuned).parent, "other") == []
    assert Probes().of(tmp_path, fingerprint) == []
    (tmp_path / FILE).write_text('{"model": 3')
    assert Probes().of(tmp_path, fingerprint) == []


def test_a_probe_tells_of_the_base_as_well(base, tuned):
    probes = Probes()
    texts = probes.of(Path(tuned).parent, model_fingerprint(tuned))
    back = probes.of(Path(tuned).parent, base.fingerprint)
    assert [(one.before, one.after) for one in back] == [(one.after, one.before) for one in texts]


def test_a_running_server_is_used_reloaded_and_never_ended(guest, teachers, base, tuned):
    for folder in (base.name, tuned, base.name):
        assert written(guest.teacher(folder)) == ours(folder)
    # What it was started with may have changed since, so that too is handed over.
    assert guest.handovers == ["reload"] * 3
    guest.close()
    assert not teachers.server.gone()


def test_addresses_that_are_no_vllm_are_said(guest, base, monkeypatch):
    nobody = replace(guest, settings=replace(guest.settings, url="http://127.0.0.1:9"))
    with pytest.raises(UserError, match=r"no server answers there .ConnectError."):
        nobody.teacher(base.name)
    monkeypatch.setenv("TEST_KEY", "wrong")
    with pytest.raises(UserError, match="the server refuses the key: set TEST_KEY"):
        guest.check(base.name)


@pytest.mark.slow
def test_without_reload_there_is_a_restart(teachers, base, tuned):
    teachers.teacher(base.name)
    own, settings = teachers.server, teachers.settings
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
