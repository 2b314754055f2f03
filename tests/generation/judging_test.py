"""What a judge is asked, and the scores that are read out of what it says."""

import pytest

from montessori_jax.generation.judging import build_judge_prompt, read_score


def test_the_prompt_has_the_instruction_the_response_and_the_form_of_the_answer():
    (turn,) = build_judge_prompt("Name a river.\nIn Africa.", "The Nile.").messages or []
    assert turn["role"] == "user"
    assert "<asked>\nName a river.\nIn Africa.\n</asked>" in turn["content"]
    assert "<response>\nThe Nile.\n</response>" in turn["content"]
    assert read_score(turn["content"].splitlines()[-1]) == 0


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Good.\nScore: 4", 4.0),
        ("**Score:** 3", 3.0),
        ("Total score: **5**", 5.0),
        ("Score = 2.5", 2.5),
        ("score : 0/5", 0.0),
        ("Were it complete I would say Score: 5, but it is not.\nScore: 2", 2.0),
        ("Score: 6", None),
        ("Score: -1", None),
        ("Score: 10", None),
        ("Score: four", None),
        ("I give it 4 points.", None),
        ("", None),
    ],
)
def test_the_last_score_from_0_to_5_counts(text, score):
    assert read_score(text) == score
