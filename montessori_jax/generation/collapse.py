"""Stopping a generation stage whose yield has collapsed, with the setting that usually helps."""

import json

from montessori_jax.errors import UserError
from montessori_jax.generation.filters import FilterReport
from montessori_jax.generation.parsing import CAUSES as PARSE_CAUSES

EXAMPLE_CHARACTERS = 100


def check_yield(
    report: FilterReport,
    *,
    floor: float,
    min_attempts: int,
    style: str,
    repetition_penalty: float = 1.0,
    max_tokens: int | None = None,
) -> None:
    """Raises when the teacher yields too little to go on.

    Args:
        report: what has been sampled so far.
        floor: least acceptable share of kept texts, in [0, 1].
        min_attempts: texts to sample before the yield is judged.
        style: the prompt style in use.
        repetition_penalty: the repetition penalty in use; 1 is none.
        max_tokens: the length limit in use.

    Raises:
        UserError: ``report.yielded < floor`` after at least ``min_attempts``; one line with the
            counts by cause, an example of the first cause, and a setting to change.
    """
    if report.attempts < max(min_attempts, 1) or report.yielded >= floor:
        return
    causes = report.ordered()
    first = causes[0][0]
    counts = ", ".join(f"{cause} {count}" for cause, count in causes)
    advice = _advice(
        report,
        style=style,
        repetition_penalty=repetition_penalty,
        max_tokens=max_tokens,
    )
    raise UserError(
        f"the teacher's yield collapsed: {report.kept} of {report.attempts} texts kept, "
        f"{report.yielded:.1%} where {floor:.1%} is the least ({counts}); "
        f"for example {first}: {_quote(report.examples[first][0].text)}; {advice}"
    )


def _advice(
    report: FilterReport,
    *,
    style: str,
    repetition_penalty: float = 1.0,
    max_tokens: int | None = None,
) -> str:
    """The one setting most likely to raise the yield, given what was rejected most.

    Measured on SmolLM2-135M-Instruct: a repetition penalty of 1.5 leaves nothing to parse in any
    style and 1.1 already costs; without one, ``chat`` parses in none of 32 samples while ``turns``
    and ``list`` parse in all. So where parsing is what fails these two come first.
    """
    unparsed = sum(count for cause, count in report.counts.items() if cause in PARSE_CAUSES)
    causes = report.ordered()
    if 2 * unparsed >= report.attempts - report.kept:
        if repetition_penalty > 1.0:
            return (
                "small models turn to gibberish under a repetition penalty: lower "
                f"generation.repetition_penalty from {repetition_penalty:g} to 1"
            )
        parse_cause = next(cause for cause, _ in causes if cause in PARSE_CAUSES)
        if parse_cause == "truncated":
            limit = "" if max_tokens is None else f" above {max_tokens}"
            return f"the texts are cut off: raise generation.max_tokens{limit}"
        if style == "chat":
            return (
                "small models follow examples better than descriptions: set "
                "generation.style to turns instead of chat"
            )
        return "lower generation.temperature or generation.top_p, or choose a larger teacher"
    return _FILTER_ADVICE[next(cause for cause, _ in causes if cause not in PARSE_CAUSES)]


_FILTER_ADVICE = {
    "too_short": "lower generation.filters.min_words",
    "too_long": "raise generation.filters.max_words or lower generation.max_tokens",
    "keyword": "shorten generation.filters.keywords or remove seeds that use these words",
    "punctuation_start": "set generation.filters.allow_punctuation_start to true",
    "non_ascii_start": "set generation.filters.allow_non_ascii_start to true",
    "exact_duplicate": "raise generation.temperature or give more seeds",
    "near_duplicate": "raise generation.temperature, give more seeds, or raise "
    "generation.filters.rouge_threshold",
}


def _quote(text: str) -> str:
    """The start of a text on one line, in quotes."""
    line = " ".join(text.split())
    if len(line) > EXAMPLE_CHARACTERS:
        line = line[: EXAMPLE_CHARACTERS - 3] + "..."
    return json.dumps(line, ensure_ascii=False)
