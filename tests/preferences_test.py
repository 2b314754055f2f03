import pytest

from montessori_jax.config import PreferencesConfig
from montessori_jax.errors import UserError
from montessori_jax.preferences import Scored, build_pairs, helpful, hold_out


def scored(prompt, *influences, offset=None):
    return [
        Scored(f"{prompt}-{i}", prompt, f"text {prompt} {i}", value, offset)
        for i, value in enumerate(influences)
    ]


def ids(pairs):
    return {(pair.chosen.id, pair.rejected.id) for pair in pairs}


def test_sign_pairs_each_positive_with_each_negative():
    pairs, report = build_pairs(scored("a", 0.3, -0.1, 0.2, -0.4), PreferencesConfig(rule="sign"))
    assert ids(pairs) == {("a-0", "a-1"), ("a-0", "a-3"), ("a-2", "a-1"), ("a-2", "a-3")}
    assert [round(pair.gap, 12) for pair in pairs] == [0.7, 0.6, 0.4, 0.3]
    assert (report.prompts, report.pairs, report.without) == (1, 4, {})


def test_sign_builds_nothing_when_momentum_moves_all_to_one_side_and_says_so():
    pairs, report = build_pairs(
        scored("a", 0.3, 0.1) + scored("b", 0.2), PreferencesConfig(rule="sign")
    )
    assert pairs == []
    assert report.without == {"all on one side": 1, "fewer than two scored candidates": 1}


def test_relative_splits_at_the_zero_gradient_step():
    members = scored("a", 0.3, 0.1, 0.25, offset=0.2)
    pairs, _ = build_pairs(members, PreferencesConfig(rule="relative"))
    assert ids(pairs) == {("a-0", "a-1"), ("a-2", "a-1")}


def test_relative_without_offset_is_refused():
    with pytest.raises(UserError, match="offset"):
        build_pairs(scored("a", 0.3, 0.1), PreferencesConfig(rule="relative"))


def test_extremes_takes_best_and_worst_and_none_of_equals():
    settings = PreferencesConfig(rule="extremes")
    pairs, report = build_pairs(scored("a", 0.3, 0.1, 0.5) + scored("b", 0.2, 0.2), settings)
    assert ids(pairs) == {("a-2", "a-1")}
    assert report.without == {"all influences equal": 1}


def test_candidates_without_a_finite_influence_take_no_part():
    members = scored("a", 0.3, None, float("nan"), -0.1, float("inf"))
    pairs, _ = build_pairs(members, PreferencesConfig(rule="sign"))
    assert ids(pairs) == {("a-0", "a-3")}


def test_the_same_text_is_never_preferred_to_itself():
    twins = [Scored("x", "a", "same", 0.1), Scored("y", "a", "same", -0.1)]
    pairs, report = build_pairs(twins, PreferencesConfig(rule="sign"))
    assert pairs == []
    assert report.without == {"same text on both sides": 1}


def test_cap_keeps_the_widest():
    settings = PreferencesConfig(rule="sign", max_pairs_per_prompt=1)
    pairs, _ = build_pairs(scored("a", 0.3, -0.1, 0.2, -0.4), settings)
    assert ids(pairs) == {("a-0", "a-3")}


def test_hold_out_takes_whole_prompts_and_is_keyed_by_the_seed():
    members = [one for name in "abcdefgh" for one in scored(name, 0.2, 0.1, -0.1)]
    pairs, _ = build_pairs(members, PreferencesConfig(rule="sign"))
    train, held = hold_out(pairs, 0.25, seed=3)
    assert len({pair.prompt_id for pair in held}) == 2
    assert not {pair.prompt_id for pair in held} & {pair.prompt_id for pair in train}
    assert ids(train) | ids(held) == ids(pairs)
    assert hold_out(pairs, 0.25, seed=3) == (train, held)
    assert any(hold_out(pairs, 0.25, seed=s)[1] != held for s in range(4, 9))


def test_hold_out_leaves_something_to_train_on():
    pairs, _ = build_pairs(scored("a", 0.2, -0.1), PreferencesConfig(rule="sign"))
    assert hold_out(pairs, 0.5, seed=0) == (pairs, [])
    assert hold_out([], 0.5, seed=0) == ([], [])


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("sign", ["a-0", "a-2", "b-0", "b-1"]),
        ("relative", ["a-0", "b-0", "b-1"]),
        ("extremes", ["a-0", "b-1"]),
    ],
)
def test_helpful_candidates_by_each_rule(rule, expected):
    members = [
        *scored("a", 0.3, -0.1, 0.05, offset=0.1),
        *scored("b", 0.2, 0.4, None, offset=0.1),
        *scored("c", -0.1, -0.1, offset=0.1),
    ]
    assert [one.id for one in helpful(members, PreferencesConfig(rule=rule))] == expected
