"""SmolLM2 under the harness: our model class beside the harness's own for transformers."""

from pathlib import Path

import lm_eval
import numpy as np
import pytest
from lm_eval.models.huggingface import HFLM

from montessori_jax.config import HarnessConfig
from montessori_jax.evaluation.lm_harness import load_tasks, one_process
from montessori_jax.evaluation.lm_harness.model import MontessoriLM
from tests.evaluation.harness_tasks import CHOICE, WRITTEN, read_lines, write_task

SHOTS = 25


@pytest.fixture(scope="module")
def ours(smollm2):
    return MontessoriLM(smollm2, settings=HarnessConfig(tokens_per_pass=1024))


@pytest.fixture(scope="module")
def theirs(smollm2_torch, smollm2_tokenizer):
    return HFLM(pretrained=smollm2_torch, tokenizer=smollm2_tokenizer, device="cpu", batch_size=4)


def write_tasks(folder: Path, data: Path, *, zero: int, shots: int, written: int, most: int) -> str:
    """ARC-Challenge without and with shots (rows 275 to 299), GSM8K; returns the folder."""
    arc, gsm8k = data / "arc_challenge_first_300.jsonl", data / "gsm8k_test_first_300.jsonl"
    exemplars = read_lines(arc, SHOTS, start=275)
    write_task(folder, "arc_zero", {"test": read_lines(arc, zero)}, CHOICE)
    rows = {"test": read_lines(arc, shots), "shots": exemplars}
    write_task(folder, "arc_shots", rows, CHOICE)
    drawn = {"until": ["Question:"], "max_gen_toks": most, "do_sample": False}
    rows = {"test": read_lines(gsm8k, written)}
    write_task(folder, "gsm8k_rows", rows, {**WRITTEN, "generation_kwargs": drawn})
    return str(folder)


def samples_of(model, folder, tasks):
    with one_process():
        found = lm_eval.evaluate(lm=model, task_dict=load_tasks(tasks, folder))
    return found["samples"]


def check_parity(ours, theirs, folder, shots):
    tasks = ("arc_zero:0", f"arc_shots:{shots}", "gsm8k_rows:0")
    found, expected = (samples_of(model, folder, tasks) for model in (ours, theirs))
    for name in ("arc_zero", "arc_shots"):
        for mine, other in zip(found[name], expected[name], strict=True):
            assert mine["arguments"] == other["arguments"]
            assert (mine["acc"], mine["acc_norm"]) == (other["acc"], other["acc_norm"])
            totals, others = (
                [one[0] for one in sample["filtered_resps"]] for sample in (mine, other)
            )
            assert np.argmax(totals) == np.argmax(others)
            np.testing.assert_allclose(totals, others, rtol=0, atol=1e-3)
            flags, other_flags = (
                [one[1] for one in sample["filtered_resps"]] for sample in (mine, other)
            )
            assert flags == other_flags
    texts, others = (
        [sample["resps"][0][0] for sample in samples["gsm8k_rows"]] for samples in (found, expected)
    )
    assert texts == others
    assert sum(map(bool, texts)) > len(texts) / 2  # now and then both write nothing


def test_a_few_rows_are_answered_as_by_transformers(ours, theirs, shared_data, tmp_path):
    sizes = {"zero": 6, "shots": 1, "written": 2, "most": 8}
    check_parity(ours, theirs, write_tasks(tmp_path, shared_data, **sizes), 3)


@pytest.mark.slow
def test_two_hundred_rows_are_answered_as_by_transformers(ours, theirs, shared_data, tmp_path):
    sizes = {"zero": 200, "shots": 5, "written": 20, "most": 128}
    check_parity(ours, theirs, write_tasks(tmp_path, shared_data, **sizes), SHOTS)
