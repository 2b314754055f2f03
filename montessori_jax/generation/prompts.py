"""What the teacher is asked: instruction prompts in three styles, and response prompts.

The task is Montessori-Instruct's (Li, Yu, Xiong 2025, arXiv 2410.14208): from eight examples write
one new instruction, six of them seeds and two written earlier by the teacher. The words are ours.

- ``chat``: one user turn holds the description and the examples; the teacher first says why, then
  writes the instruction between tags. The paper's form, for teachers that follow a format.
- ``turns``: each example is an earlier assistant turn. Small models follow the pattern where they
  do not follow the description.
- ``list``: plain text without a chat template, one tagged example a line. For base models.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from montessori_jax.errors import UserError

OPENING_TAG = "<instruction>"
CLOSING_TAG = "</instruction>"
STYLES = ("chat", "turns", "list")
# A piece of any text but the first letters of a tag of ours.
_PIECE = "([^<]|<[^</i]|</[^<i])"

_TASK = (
    "Write one new instruction that a person might give to an AI assistant. It can be a question "
    "or a request, on any subject. The assistant will see nothing but your text, so include "
    "whatever passage, data or code it needs to answer. Be clear, correct and brief, and choose "
    "a subject and a kind of task that the examples do not cover."
)
_REASON = (
    "Begin with a sentence on why this instruction is worth having. After it, write the "
    f"instruction itself, once, between {OPENING_TAG} and {CLOSING_TAG}, and stop there."
)
_FIRST_TURN = f"{_TASK} Write it between {OPENING_TAG} and {CLOSING_TAG}."
_NEXT_TURN = "Write another one, on a different subject."
_SAME_SKILL = (
    "Write one new instruction for an AI assistant that takes the same skill as the one below, and "
    "is about as hard, with other content: not a rewording of it. Include whatever passage, data "
    "or code is needed to answer."
)
_NEXT_OF_A_SKILL = (
    "Write another one that takes the same skill and is about as hard, with other content."
)
_SKILL_HEADING = (
    "Instructions that people gave to an AI assistant. All take the same skill, and no two have "
    "the same content."
)
_LIST_HEADING = (
    "Instructions that people gave to an AI assistant. No two are about the same subject, and "
    "each can be answered from its text alone."
)


@dataclass(frozen=True)
class Prompt:
    """One request to a model.

    Attributes:
        messages: chat messages (``role``, ``content``) that end with a user turn, for the model's
            chat template; None for plain text.
        text: plain text that the model continues, without any template; None for chat.
        prefill: how the answer begins. It is appended to the prompt, so the sampled text lacks it.
        stop: strings that end the answer. A stop string belongs to the answer it ends.
        pattern: regular expression of the answers that can be parsed, after the prefill; "" where
            any can. In the common subset of dialects: no look-around.
    """

    messages: list[dict[str, str]] | None
    text: str | None
    prefill: str
    stop: tuple[str, ...]
    pattern: str = ""

    def __post_init__(self) -> None:
        if (self.messages is None) == (self.text is None):
            raise ValueError("a prompt has either messages or text")


def task_text(instruction: str, input: str = "") -> str:
    """An instruction with its input, if it has one, after a newline."""
    return f"{instruction}\n{input}" if input else instruction


def build_instruction_prompt(style: str, exemplars: Sequence[str]) -> Prompt:
    """The request for one new instruction.

    Args:
        style: ``chat``, ``turns`` or ``list``; see the module's text.
        exemplars: example instructions in the order in which they are shown, each with its input
            (``task_text``).

    Raises:
        UserError: the style is unknown, or there are no exemplars.
    """
    if not exemplars:
        raise UserError("an instruction prompt needs at least one exemplar; give seeds")
    tagged = [f"{OPENING_TAG}{exemplar}{CLOSING_TAG}" for exemplar in exemplars]
    stop = (CLOSING_TAG,)
    if style == "chat":
        content = "\n\n".join([_TASK, _REASON, "Examples of instructions:\n" + "\n".join(tagged)])
        pattern = f"{_PIECE}*{OPENING_TAG}{_PIECE}+{CLOSING_TAG}"
        return Prompt([{"role": "user", "content": content}], None, "", stop, pattern)
    if style == "turns":
        messages = [{"role": "user", "content": _FIRST_TURN}]
        for turn in tagged:
            messages.append({"role": "assistant", "content": turn})
            messages.append({"role": "user", "content": _NEXT_TURN})
        return Prompt(messages, None, OPENING_TAG, stop, f"{_PIECE}+{CLOSING_TAG}")
    if style == "list":
        text = "\n".join([_LIST_HEADING, *tagged, ""])
        return Prompt(None, text, OPENING_TAG, stop, f"{_PIECE}+{CLOSING_TAG}")
    raise UserError(f"unknown prompt style {style!r}; choose one of {', '.join(STYLES)}")


def build_expansion_prompt(style: str, example: str) -> Prompt:
    """The request for one new instruction that takes the skill of ``example``.

    Arguments and errors are as of `build_instruction_prompt`; the answer is read alike.
    """
    plain = build_instruction_prompt(style, [example])
    tagged = f"{OPENING_TAG}{example}{CLOSING_TAG}"
    if style == "chat":
        content = "\n\n".join([_SAME_SKILL, _REASON, f"The instruction:\n{tagged}"])
        return replace(plain, messages=[{"role": "user", "content": content}])
    if style == "turns":
        assert plain.messages is not None
        following = {"role": "user", "content": _NEXT_OF_A_SKILL}
        return replace(plain, messages=[*plain.messages[:-1], following])
    return replace(plain, text="\n".join([_SKILL_HEADING, tagged, ""]))


def build_response_prompt(instruction: str, input: str = "") -> Prompt:
    """The request for a response: the instruction, with its input, as a user turn."""
    return Prompt([{"role": "user", "content": task_text(instruction, input)}], None, "", ())


def choose_exemplars(
    seeds: Sequence[str],
    generated: Sequence[str],
    *,
    seed: int,
    prompt_index: int,
    num_seed: int = 6,
    num_generated: int = 2,
) -> list[str]:
    """Draws the exemplars of one prompt, without replacement, in shuffled order.

    ``num_seed`` seeds and ``num_generated`` generated instructions; while fewer than
    ``num_generated`` exist, seeds take their places.

    The draw is a function of the arguments alone: a Philox generator (counter-based) keyed by
    ``(seed, prompt_index)``, whatever was drawn before. For a run that can be interrupted,
    ``generated`` must likewise be fixed by the prompt's index, for instance the instructions kept
    from the rounds of prompts before this one.

    Raises:
        UserError: there are fewer seeds than the prompt needs.
    """
    if len(generated) < num_generated:
        num_seed, num_generated = num_seed + num_generated, 0
    if len(seeds) < num_seed:
        raise UserError(
            f"a prompt needs {num_seed} seed instructions and there are {len(seeds)}; "
            "give more seeds or ask for fewer exemplars"
        )
    mask = (1 << 64) - 1
    key = np.array([seed & mask, prompt_index & mask], np.uint64)
    rng = np.random.Generator(np.random.Philox(key=key))
    chosen = [seeds[i] for i in rng.choice(len(seeds), num_seed, replace=False)]
    if num_generated:
        picks = rng.choice(len(generated), num_generated, replace=False)
        chosen += [generated[i] for i in picks]
    return [chosen[i] for i in rng.permutation(len(chosen))]
