import pytest

from montessori_jax.generation.responses import finished_part


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One sentence. And a half", "One sentence."),
        ('He said "stop!" and then', 'He said "stop!"'),
        ("No end at all", ""),
        ("A list:\n1. Apples\n2. Pea", "A list:\n1. Apples"),
        ("Pi is 3.14 and more", ""),
        ("Done.", "Done."),
    ],
)
def test_trim_ends_at_the_last_whole_sentence_or_line(text, expected):
    assert finished_part(text, "length", "trim") == expected


def test_a_text_that_ended_by_itself_is_kept_whole():
    assert finished_part("  no full stop ", "end", "trim") == "no full stop"


def test_keep_and_drop():
    assert finished_part("a. b", "length", "keep") == "a. b"
    assert finished_part("a. b", "length", "drop") == ""
