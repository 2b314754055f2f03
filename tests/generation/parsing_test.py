"""Every way in which a teacher's text holds, or fails to hold, one instruction."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from montessori_jax.generation import prompts
from montessori_jax.generation.parsing import CAUSES, Finish, Parsed, parse_instruction

OPEN, CLOSE = prompts.OPENING_TAG, prompts.CLOSING_TAG


def parse(raw: str, style: str, finish: Finish) -> Parsed:
    """Parses as the stage does, with the prefill that the style's prompt has."""
    prefill = prompts.build_instruction_prompt(style, ["Name a bird."]).prefill
    return parse_instruction(raw, style=style, prefill=prefill, finish=finish)


# (style, finish, raw, instruction). The texts marked * were sampled from SmolLM2-135M-Instruct.
GOOD: list[tuple[str, Finish, str, str]] = [
    ("chat", "end", f"Rivers matter.\n{OPEN}Why do rivers bend?{CLOSE}", "Why do rivers bend?"),
    ("chat", "stop", f"Rivers matter.\n{OPEN}Why do rivers bend?", "Why do rivers bend?"),
    ("chat", "end", f"{OPEN}\n  Why do rivers bend?\n{CLOSE}\nEnd.", "Why do rivers bend?"),
    ("chat", "end", f"In {OPEN} tags: {OPEN}Why?  Say WHY{CLOSE}", "Why?  Say WHY"),
    ("chat", "end", f"Good. {OPEN}Name a bird{CLOSE} {OPEN}Name a bird{CLOSE}", "Name a bird"),
    ("chat", "end", "< Instruction >Name a BIRD</ INSTRUCTION >", "Name a BIRD"),
    ("chat", "length", f"{OPEN}Name a bird{CLOSE} and now, to say more,", "Name a bird"),
    ("turns", "stop", f"What is the 80/20 ratio?{CLOSE}", "What is the 80/20 ratio?"),  # *
    ("turns", "stop", "What is the 80/20 ratio?", "What is the 80/20 ratio?"),
    ("turns", "stop", f"No more please.\n{CLOSE}", "No more please."),  # *
    (
        "turns",
        "end",
        'Append to the title of a book: "Light Your Own Garden"',  # *
        'Append to the title of a book: "Light Your Own Garden"',
    ),
    ("turns", "end", f" {OPEN}What is the 80/20 ratio?{CLOSE}", "What is the 80/20 ratio?"),
    (
        "list",
        "stop",
        f"Connect a piece of writing using a word team.\nAva made a cake with napkins.{CLOSE}",  # *
        "Connect a piece of writing using a word team.\nAva made a cake with napkins.",
    ),
    ("list", "length", f"Name a bird{CLOSE}\n{OPEN}Name a fish{CLOSE}\n{OPEN}Na", "Name a bird"),
    ("list", "stop", f"Écris un poème sur l'été{CLOSE}", "Écris un poème sur l'été"),
]

# (cause, style, finish, raw)
BAD: list[tuple[str, str, Finish, str]] = [
    ("no_tags", "chat", "end", "A very good question."),  # *
    ("no_tags", "chat", "length", "The instruction is a guide to apply data analysis"),
    ("no_opening_tag", "chat", "end", f"Name a bird.{CLOSE}"),
    ("no_opening_tag", "chat", "stop", "Name a bird."),
    (
        "no_closing_tag",
        "chat",
        "end",
        f"{OPEN}To improve your understanding of history, it is necessary to thoroughly "
        "analyze the key events that shaped the world.",  # *
    ),
    ("no_closing_tag", "list", "end", "Name a bird."),
    ("truncated", "chat", "length", f"{OPEN}You are given two sentences, you need to find"),  # *
    ("truncated", "turns", "length", "Append PLAIN content after this item when asked"),  # *
    ("truncated", "list", "length", "Name a"),
    ("nested_tags", "turns", "stop", f"Name a bird.{OPEN}Name a fish.{CLOSE}"),
    ("nested_tags", "list", "length", f"Name a bird.\n{OPEN}Name a fish.\n{OPEN}Na"),
    ("several_instructions", "chat", "end", f"{OPEN}A bird?{CLOSE}\n{OPEN}A fish?{CLOSE}"),
    ("several_instructions", "chat", "length", f"{OPEN}A bird?{CLOSE}\n{OPEN}A fi"),
    ("several_instructions", "turns", "end", f"A bird?{CLOSE}\n{OPEN}A fish?{CLOSE}"),
    ("empty", "chat", "end", " \n"),
    ("empty", "chat", "end", f"{OPEN} {CLOSE}"),
    ("empty", "turns", "end", ""),
    ("empty", "turns", "stop", CLOSE),
    ("empty", "list", "stop", f"...?!{CLOSE}"),
]


@pytest.mark.parametrize(("style", "finish", "raw", "instruction"), GOOD)
def test_instruction_is_found(style: str, finish: Finish, raw: str, instruction: str) -> None:
    assert parse(raw, style, finish) == Parsed(raw, instruction, None)


@pytest.mark.parametrize(("cause", "style", "finish", "raw"), BAD)
def test_failure_has_its_cause(cause: str, style: str, finish: Finish, raw: str) -> None:
    assert parse(raw, style, finish) == Parsed(raw, None, cause)


def test_every_cause_is_tested_and_explained() -> None:
    assert {cause for cause, *_ in BAD} == set(CAUSES)


def test_end_of_turn_closes_only_a_turn_that_opened_with_the_tag() -> None:
    raw = f"Here is one: {OPEN}Name a bird"
    assert parse_instruction(raw, style="turns", finish="end").cause == "no_closing_tag"
    bare = parse_instruction(f"{OPEN}Name a bird", style="turns", finish="end")
    assert bare.instruction == "Name a bird"


def test_unknown_style_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown prompt style"):
        parse_instruction("x", style="poem")


@given(
    st.lists(st.sampled_from([OPEN, CLOSE, "Name a Bird", " ", "\n", "<", "É"]), max_size=10),
    st.sampled_from(prompts.STYLES),
    st.sampled_from(["stop", "end", "length"]),
)
def test_parsing_is_total_and_lossless(parts: list[str], style: str, finish: Finish) -> None:
    raw = "".join(parts)
    parsed = parse(raw, style, finish)
    assert parsed.raw == raw
    if parsed.instruction is None:
        assert parsed.cause in CAUSES
    else:
        assert parsed.cause is None
        assert parsed.instruction in raw
        assert parsed.instruction == parsed.instruction.strip()
        assert OPEN not in parsed.instruction
        assert CLOSE not in parsed.instruction
