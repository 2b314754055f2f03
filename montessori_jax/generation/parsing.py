"""Finding the instruction in a teacher's text, or saying exactly why there is none.

The text itself is never changed: ``Parsed.raw`` is what was sampled, rationale and all, since that
is what DPO trains the teacher on. The instruction is a slice of it without the white space around.
"""

import re
from dataclasses import dataclass

from montessori_jax.generation.endings import Finish
from montessori_jax.generation.prompts import CLOSING_TAG, STYLES

CAUSES = {
    "no_tags": "the instruction tags are missing",
    "no_opening_tag": "a closing tag without an opening one",
    "no_closing_tag": "the text ended inside the tags",
    "truncated": "the length limit fell inside the tags",
    "nested_tags": "a second opening tag inside the instruction",
    "several_instructions": "more than one instruction",
    "empty": "nothing to read: no letter and no digit",
}
"""Cause of a parse failure -> what it means."""

_TAG = re.compile(r"<\s*(/?)\s*instruction\s*>", re.IGNORECASE)


@dataclass(frozen=True)
class Parsed:
    """What a teacher's text was found to hold: an instruction, or the cause of having none.

    Attributes:
        raw: the sampled text, unchanged.
        instruction: the instruction without surrounding white space; None on failure.
        cause: a key of ``CAUSES``; None on success.
    """

    raw: str
    instruction: str | None
    cause: str | None


@dataclass(frozen=True)
class _Scan:
    """The tags of a text: complete blocks, and what was left over."""

    blocks: list[str]
    open_at: int | None  # where the text after an unclosed opening tag begins
    stray_closing: bool
    nested: bool


def parse_instruction(raw: str, *, style: str, prefill: str = "", finish: Finish = "end") -> Parsed:
    """Reads the one instruction in a teacher's answer.

    Tags are matched in any case and with white space inside them. What each style accepts:

    - ``chat``: one tagged instruction with any text around it. An opening tag that the rationale
      mentions before the real one is passed over.
    - ``turns``: the same; and when the turn ended without a closing tag, all that follows an
      opening tag at its start, since there the turn is the instruction (5 of 32 samples of
      SmolLM2-135M-Instruct).
    - ``list``: the first tagged instruction, as a base model goes on with the next ones.

    Args:
        raw: the sampled text, without the prefill, with or without the stop string that ended it.
        style: the prompt's style.
        prefill: the prompt's prefill.
        finish: how sampling ended.

    Raises:
        ValueError: the style is unknown.
    """
    if style not in STYLES:
        raise ValueError(f"unknown prompt style {style!r}")
    text = prefill + raw
    if finish == "stop" and not text.rstrip().endswith(CLOSING_TAG):
        # The closing tag is the only stop string, and a sampler may leave it out.
        text += CLOSING_TAG
    scan = _scan(text, prefilled=bool(_TAG.match(prefill)))

    blocks = scan.blocks
    if not raw.strip():
        return Parsed(raw, None, "empty")
    if scan.nested:
        return Parsed(raw, None, "nested_tags")
    if not blocks and scan.open_at is not None:
        if finish == "length":
            return Parsed(raw, None, "truncated")
        starts_turn = not _TAG.sub("", text[: scan.open_at]).strip()
        if style != "turns" or not starts_turn:
            return Parsed(raw, None, "no_closing_tag")
        blocks = [text[scan.open_at :].strip()]
    elif not blocks:
        return Parsed(raw, None, "no_opening_tag" if scan.stray_closing else "no_tags")
    elif style != "list" and (len(set(blocks)) > 1 or scan.open_at is not None):
        return Parsed(raw, None, "several_instructions")

    if not any(character.isalnum() for character in blocks[0]):
        return Parsed(raw, None, "empty")
    return Parsed(raw, blocks[0], None)


def _scan(text: str, *, prefilled: bool) -> _Scan:
    """Pairs each closing tag with the opening tag nearest before it.

    Where the first opening tag was ours (``prefilled``), text between it and another opening tag
    is an instruction left unclosed: ``nested``. Elsewhere that text is rationale.
    """
    blocks: list[str] = []
    open_at: int | None = None
    stray_closing = nested = False
    for tag in _TAG.finditer(text):
        if not tag[1]:
            if open_at is not None and prefilled and not blocks:
                nested = nested or bool(text[open_at : tag.start()].strip())
            open_at = tag.end()
        elif open_at is None:
            stray_closing = True
        else:
            blocks.append(text[open_at : tag.start()].strip())
            open_at = None
    return _Scan(blocks, open_at, stray_closing, nested)
