"""The three prompt styles as a template renders them, and the draw of exemplars."""

import re
from collections import Counter

import pytest
from jinja2 import Environment

from montessori_jax.errors import UserError
from montessori_jax.generation import prompts
from montessori_jax.generation.prompts import CLOSING_TAG, OPENING_TAG, Prompt, choose_exemplars

EXEMPLARS = [f"Explain topic {i}.\nwith input {i}" for i in range(8)]
SEEDS = [f"seed {i}" for i in range(40)]
GENERATED = [f"generated {i}" for i in range(20)]
KNOWN_DRAW = ["seed 37", "seed 1", "seed 11", "generated 15", "seed 31", "generated 7"]
KNOWN_DRAW += ["seed 0", "seed 6"]
CHATML = Environment(keep_trailing_newline=True).from_string(
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)


def tagged(text: str) -> list[str]:
    return re.findall(f"{OPENING_TAG}(.+?){CLOSING_TAG}", text, re.DOTALL)


def test_chat_is_one_user_turn_with_every_exemplar_in_order() -> None:
    prompt = prompts.build_instruction_prompt("chat", EXEMPLARS)
    assert prompt.text is None
    assert prompt.prefill == ""
    assert prompt.stop == (CLOSING_TAG,)
    assert prompt.messages is not None
    (message,) = prompt.messages
    assert message["role"] == "user"
    assert tagged(message["content"].split("Examples of instructions:\n")[1]) == EXEMPLARS


def test_turns_shows_each_exemplar_as_an_assistant_turn_and_asks_for_one_more() -> None:
    prompt = prompts.build_instruction_prompt("turns", EXEMPLARS)
    assert prompt.messages is not None
    roles = [message["role"] for message in prompt.messages]
    assert roles == ["user", "assistant"] * 8 + ["user"]
    answers = [m["content"] for m in prompt.messages if m["role"] == "assistant"]
    assert answers == [OPENING_TAG + exemplar + CLOSING_TAG for exemplar in EXEMPLARS]
    # What the teacher is to continue looks exactly like the turns it has seen.
    rendered = CHATML.render(messages=prompt.messages) + prompt.prefill
    assert rendered.endswith("<|im_start|>assistant\n" + OPENING_TAG)
    assert rendered.count("<|im_start|>assistant\n" + OPENING_TAG) == 9


def test_list_is_plain_text_that_breaks_off_where_the_next_line_opens() -> None:
    prompt = prompts.build_instruction_prompt("list", EXEMPLARS)
    assert prompt.messages is None
    assert prompt.text is not None
    assert tagged(prompt.text) == EXEMPLARS
    assert prompt.text.endswith(CLOSING_TAG + "\n")
    assert prompt.prefill == OPENING_TAG
    assert prompt.stop == (CLOSING_TAG,)


def test_response_prompt_is_the_instruction_with_its_input() -> None:
    plain = prompts.build_response_prompt("Name a bird.")
    assert plain == Prompt([{"role": "user", "content": "Name a bird."}], None, "", ())
    with_input = prompts.build_response_prompt("Translate.", "Guten Tag")
    assert with_input.messages == [{"role": "user", "content": "Translate.\nGuten Tag"}]


def test_bad_requests_are_named() -> None:
    with pytest.raises(UserError, match=r"unknown prompt style 'poem'; choose one of chat, turns"):
        prompts.build_instruction_prompt("poem", EXEMPLARS)
    with pytest.raises(UserError, match="at least one exemplar"):
        prompts.build_instruction_prompt("chat", [])
    with pytest.raises(ValueError, match="either messages or text"):
        Prompt(None, None, "", ())


def test_six_seeds_and_two_generated_once_two_exist() -> None:
    for generated, expected in [([], 0), (GENERATED[:1], 0), (GENERATED[:2], 2), (GENERATED, 2)]:
        chosen = choose_exemplars(SEEDS, generated, seed=0, prompt_index=3)
        assert len(chosen) == len(set(chosen)) == 8
        assert sum(text.startswith("generated") for text in chosen) == expected


def test_the_draw_depends_on_seed_and_index_alone() -> None:
    def draw(seed: int, index: int) -> list[str]:
        return choose_exemplars(SEEDS, GENERATED, seed=seed, prompt_index=index)

    forwards = [draw(5, index) for index in range(30)]
    backwards = [draw(5, index) for index in reversed(range(30))]
    assert forwards == backwards[::-1]
    assert len({tuple(chosen) for chosen in forwards}) == 30
    assert draw(6, 0) != draw(5, 0)
    # Neither number is folded into the other: (seed, index) is no sum or product.
    assert draw(5, 6) != draw(6, 5)
    assert draw(-1, 0) != draw(1, 0)


def test_a_known_draw() -> None:
    # Changes only if the generator's stream does; then stored runs cannot be resumed.
    assert choose_exemplars(SEEDS, GENERATED, seed=7, prompt_index=11) == KNOWN_DRAW


def test_every_seed_and_place_is_equally_likely() -> None:
    draws = 4000
    seeds: Counter[str] = Counter()
    first_generated = 0
    for index in range(draws):
        chosen = choose_exemplars(SEEDS, GENERATED, seed=1, prompt_index=index)
        seeds.update(text for text in chosen if text.startswith("seed"))
        first_generated += chosen[0].startswith("generated")
    # Binomial: a seed is in a draw with 6/40, mean 600, standard deviation 22.6; the first place
    # is a generated one with 2/8, mean 1000, standard deviation 27.4. Five deviations.
    assert len(seeds) == 40
    assert all(abs(count - 600) < 113 for count in seeds.values())
    assert abs(first_generated - 1000) < 137


def test_other_counts_and_too_few_seeds() -> None:
    chosen = choose_exemplars(
        SEEDS[:3], GENERATED, seed=0, prompt_index=0, num_seed=3, num_generated=1
    )
    assert sorted(text.split()[0] for text in chosen) == ["generated", "seed", "seed", "seed"]
    none = choose_exemplars(SEEDS, GENERATED, seed=0, prompt_index=0, num_generated=0)
    assert len(none) == 6
    with pytest.raises(UserError, match="needs 8 seed instructions and there are 7"):
        choose_exemplars(SEEDS[:7], [], seed=0, prompt_index=0)


@pytest.mark.parametrize("style", prompts.STYLES)
def test_an_expansion_shows_its_one_example_and_is_answered_like_any_instruction(style) -> None:
    plain = prompts.build_instruction_prompt(style, EXEMPLARS[:1])
    prompt = prompts.build_expansion_prompt(style, EXEMPLARS[0])
    assert (prompt.prefill, prompt.stop, prompt.pattern) == (
        plain.prefill,
        plain.stop,
        plain.pattern,
    )
    shown = prompt.text or "\n".join(turn["content"] for turn in prompt.messages or [])
    assert "same skill" in shown
    assert EXEMPLARS[0] in tagged(shown)
    assert "different subject" not in shown
    if prompt.messages is not None:
        assert [turn["role"] for turn in prompt.messages] == [
            turn["role"] for turn in plain.messages or []
        ]
