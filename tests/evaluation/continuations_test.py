"""Log-likelihoods beside transformers', one continuation at a time there."""

import numpy as np
import pytest
import torch

from montessori_jax.errors import UserError
from montessori_jax.evaluation.continuations import (
    Continuation,
    classes,
    lay_out,
    plant,
    row_length,
    score,
    target_scores,
)
from montessori_jax.models.sharding import laid_out
from tests.meshes import mesh_on
from tests.models.tiny import CONFIG

VOCABULARY = CONFIG["vocab_size"]


def asked(contexts=9, choices=4, longest=40):
    """Contexts with several continuations each, among them single tokens and equal ones."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(contexts):
        context = rng.integers(0, VOCABULARY, int(rng.integers(1, longest))).tolist()
        lengths = rng.integers(1, 7, choices)
        made += [Continuation(context, rng.integers(0, VOCABULARY, n).tolist()) for n in lengths]
    return [*made, made[0]]


def by_transformers(model, request, max_length):
    whole = [*request.context, *request.tokens][-(max_length + 1) :]
    with torch.no_grad():
        logits = model(torch.tensor([whole[:-1]])).logits[0, -len(request.tokens) :]
    targets = torch.tensor(request.tokens)
    log_probs = torch.log_softmax(logits.float(), -1).gather(1, targets[:, None])
    return float(log_probs.sum()), bool((logits.argmax(-1) == targets).all())


def ours(model, params, requests, **settings):
    settings = {"max_length": 100, "tokens_per_pass": 512, **settings}
    scored = [one for part, _ in score(model, params, requests, **settings) for one in part]
    assert sorted(one.request for one in scored) == list(range(len(requests)))
    return [(one.log_likelihood, one.greedy) for one in sorted(scored)]


def close(found, expected):
    np.testing.assert_allclose([f[0] for f in found], [e[0] for e in expected], atol=2e-5)
    assert [f[1] for f in found] == [e[1] for e in expected]


def likeliest(model, context, count):
    """A continuation that greedy decoding would write."""
    tokens = list(context)
    for _ in range(count):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(context) :]


def test_scores_are_those_of_transformers_one_at_a_time(student):
    theirs, model, params = student
    requests = asked()
    requests.append(Continuation([5, 6], likeliest(theirs, [5, 6], 3)))
    expected = [by_transformers(theirs, one, 100) for one in requests]
    assert any(greedy for _, greedy in expected)
    close(ours(model, params, requests), expected)


def test_long_inputs_lose_their_left_end(student):
    theirs, model, params = student
    requests = asked(longest=60)
    expected = [by_transformers(theirs, one, 20) for one in requests]
    assert any(len(one.context) + len(one.tokens) > 21 for one in requests)
    close(ours(model, params, requests, max_length=20), expected)


def test_a_mesh_changes_nothing(student):
    _, model, params = student
    requests = asked()
    there = laid_out(model, params, mesh_on("data", "fsdp", "tensor"))
    close(ours(model, there, requests), ours(model, params, requests))


def test_a_context_is_read_once_for_all_its_continuations(student):
    _, model, params = student
    context = list(range(50))
    requests = [Continuation(context, [1, 2, 3]), Continuation(context, [4]),
                Continuation(context, [5, 6])]  # fmt: skip
    [(scored, tokens)] = score(model, params, requests, max_length=100, tokens_per_pass=64)
    assert (len(scored), tokens) == (3, 50 + 2 + 0 + 1)


def test_few_lengths_are_compiled():
    rng = np.random.default_rng(1)
    requests = [
        Continuation(rng.integers(0, 9, n).tolist(), [1]) for n in rng.integers(1, 1500, 300)
    ]
    shapes = [
        (length, branched) for length, branched, _ in classes(plant(requests, 2000), 4096)
    ]  # fmt: skip
    assert len(shapes) == len(set(shapes)) <= 11
    assert [row_length(n) for n in (1, 256, 257, 512, 513, 1030)] == [256, 256, 320, 512, 640, 1280]


def test_many_continuations_do_not_outgrow_a_row():
    requests = [Continuation([1, 2, 3], [4, 5, 6, i]) for i in range(40)]
    trees = plant(requests, max_length=30)
    assert all(tree.size <= 30 for tree in trees)
    assert sorted(i for tree in trees for i in tree.indices) == list(range(40))


@pytest.mark.parametrize("request_", [Continuation([], [1]), Continuation([1], []),
                                      Continuation([1], [1] * 9)])  # fmt: skip
def test_what_cannot_be_scored_is_said(student, request_):
    _, model, params = student
    with pytest.raises(UserError, match="continuation 0"):
        list(score(model, params, [request_], max_length=8, tokens_per_pass=64))


def test_the_head_sees_targets_alone(student):
    """No array of a pass has a vocabulary for each of its tokens."""
    _, model, params = student
    trees = plant([Continuation(list(range(60)), [1, 2])], 100)
    batch = lay_out([trees], length=256, slots=16, rows=1, branched=False)
    lowered = target_scores.lower(model, params, batch, "float32", "xla").as_text()
    assert f"x{VOCABULARY}xf32" in lowered
    assert f"256x{VOCABULARY}xf32" not in lowered
