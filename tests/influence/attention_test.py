"""The kernel that settings name reaches the losses, and changes no score."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

from montessori_jax.config import InfluenceConfig
from montessori_jax.errors import UserError
from montessori_jax.influence import choose_estimator, score_candidates, scoring
from montessori_jax.influence.scoring import Student, candidates_of, probe_of
from montessori_jax.models import attention
from montessori_jax.models.attention_kernels import by_dot_product, by_splash, choose
from tests.influence.students import MODEL, chats, student

REFERENCES, ROWS = chats(3, 51), chats(3, 52)
REVERSE = ["exact", "first_order", "grad_dot", "grad_cos", "less"]
FORWARD = ["control_variate", "linearized", "second_order"]
SETTINGS = InfluenceConfig(chunk=3, max_length=48, audit=0, method="exact", pilots=2)


def score(settings: InfluenceConfig) -> np.ndarray:
    params, state, tx = student(1e-4)
    scores = score_candidates(MODEL, params, state, tx, ROWS, REFERENCES, settings)
    return np.array([one.influence for one in scores])


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def standing_in(query, key, value, allowed, scale):
    """JAX's own attention with cuDNN's derivatives: reverse mode alone."""
    return by_dot_product(query, key, value, allowed, scale, "xla")


def _forward(query, key, value, allowed, scale):
    attend = partial(by_dot_product, allowed=allowed, scale=scale, kernel="xla")
    return jax.vjp(attend, query, key, value)


standing_in.defvjp(_forward, lambda scale, pull, cotangent: (*pull(cotangent), None))


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel runs here: splash interpreted, for cuDNN a stand-in."""
    monkeypatch.setattr(attention, "choose", lambda implementation, *_, **__: implementation)
    monkeypatch.setattr(attention, "by_splash", partial(by_splash, interpret=True))
    monkeypatch.setattr(attention, "by_dot_product", standing_in)


def assert_same_scores(method: str, kernel: str) -> None:
    settings = replace(SETTINGS, method=method)
    plain = score(replace(settings, attention="xla"))
    fused = score(replace(settings, attention=kernel))
    assert not np.array_equal(fused, plain)
    np.testing.assert_allclose(fused, plain, rtol=1e-3, atol=2e-3 * np.abs(plain).max())


@pytest.mark.parametrize("method", ["exact", pytest.param("first_order", marks=pytest.mark.slow)])
def test_a_fused_kernel_gives_the_same_scores(method: str, kernels: None):
    assert_same_scores(method, "cudnn")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["exact", "first_order"])
def test_splash_attention_gives_the_same_scores(method: str, kernels: None):
    assert_same_scores(method, "splash")


@pytest.mark.parametrize(
    "method",
    [pytest.param(one, marks=[pytest.mark.slow] * (one != "linearized")) for one in FORWARD],
)
def test_forward_mode_stays_on_the_plain_path(method: str, kernels: None):
    """Through the kernel `jax.jvp` would raise."""
    settings = replace(SETTINGS, method=method)
    found = score(replace(settings, attention="cudnn"))
    np.testing.assert_array_equal(found, score(replace(settings, attention="xla")))


@pytest.mark.parametrize("method", REVERSE + FORWARD)
def test_candidates_and_references_take_the_same_kernel(method: str, monkeypatch):
    asked = []

    def reference(model, chats, *, attention, gradient_attention, **options):
        asked.extend([attention, gradient_attention])
        return true(model, chats, **options)

    true = scoring.chat_reference
    monkeypatch.setattr(scoring, "chat_reference", reference)
    settings = replace(SETTINGS, method=method, attention="splash")
    candidates = candidates_of(ROWS, ["a", "b", "c"], settings)
    probe = probe_of(Student(MODEL, *student()), candidates, REFERENCES, settings)
    expected = "xla" if method in FORWARD else "splash"
    assert [probe.candidate_loss.losses.attention, *asked] == [expected] * 3
    rows = {one.data.tokens.shape[1] for one in candidates}
    assert all(length % 128 == 0 for length in rows) == (method in REVERSE)


def test_cudnn_in_bf16_leaves_float32_parts_to_the_plain_path(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "choose", partial(choose, backend="gpu"))
    monkeypatch.setattr(attention, "by_dot_product", standing_in)
    settings = replace(SETTINGS, method="first_order", precision="bfloat16", attention="cudnn")
    plain = score(replace(settings, attention="xla"))
    params, state, tx = student(1e-4)
    audited = replace(settings, audit=2)
    with jax.numpy_dtype_promotion("standard"):  # JAX's attention adds float32 to bf16
        np.testing.assert_allclose(score(settings), plain, atol=0.05 * plain.std())
        # The audit's truth is in float32.
        choice = choose_estimator(MODEL, params, state, tx, ROWS, REFERENCES, audited)
    assert choice.audit is not None
    with pytest.raises(UserError, match="'cudnn' computes in bfloat16 alone, not float32"):
        score(replace(settings, precision="float32", row_length=384))


def test_a_kernel_of_another_machine_is_one_line():
    assert InfluenceConfig().attention == "auto"
    with pytest.raises(UserError, match="attention 'splash' needs a TPU") as caught:
        score(replace(SETTINGS, attention="splash", row_length=128))  # no other test's program
    assert "\n" not in str(caught.value)
