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
        ("Score: [4]", 4.0),
        ("Score: <4>", 4.0),
        ("**Score: [4]**", 4.0),
        ("Score (out of 5): 4", 4.0),
        ("**Score (0-5):** 3.5", 3.5),
        ("Score from 0 to 5: 2", 2.0),
        ("Score: 4 out of 5.", 4.0),
        ("Score: [4]/5", 4.0),
        ("Score: 4 (all but the last point)", 4.0),
        ("Score: 4. Once more, Score: 4.0", 4.0),
        ("Score: 4\n- 5 would need examples", 4.0),
        ("**Score:**\n4", 4.0),
        ("Score: 4/10", None),
        ("Score: 4 out of 10", None),
        ("Score: 4 (out of 10)", None),
        ("Score: 4, out of 10", None),
        ("Score: 4 of 10", None),
        ("Score: 4 points out of 10", None),
        ("Score: 4 points out of 5", 4.0),
        ("Score: 4 (of 5)", 4.0),
        ("Score: [4]/50", None),
        ("Score (out of 10): 4", None),
        ("Score: 40%", None),
        ("Score: 3-4", None),
        ("Score: [3] or [4]", None),
        ("Score: 3 to 4", None),
        ("Score: 3\u20134", None),
        ("Score: 3,5", None),
        ("Score: 1 + 1 + 1 = 3", None),
        ("Score: 3, no, Score: 4", None),
        ("Score: 3\nScore: 4/10", None),
        ("<4>", None),
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
