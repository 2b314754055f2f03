"""What a judge is asked about a response, and how its score is read.

An additive scale of five points, as in Self-Rewarding Language Models (Yuan et al. 2024,
arXiv 2401.10020); the words are ours.
"""

import re

from montessori_jax.generation.prompts import Prompt

HIGHEST = 5
# "Score: 4", "**Score:** [4]", "Score (out of 5): <4>", "Score: 4/5".
_SCALE_NAMED = r"(?:\W{0,4}(?:out of|(?:from )?0 ?(?:-|\u2013|to)) ?5)?"
_SCORE = re.compile(
    rf"score{_SCALE_NAMED}\W{{0,4}}?\s*[:=][\s*\[(<`\"']*(-?\d+(?:\.\d+)?)[\])>*`\"']*",
    re.IGNORECASE,
)
# Behind a number: another scale, the other end of a range, an alternative, a sum, a percentage.
_UNSURE = re.compile(
    r"[ \t,(]*(?:points?[ \t]+)?(?:/|(?:out )?of)\s*(?!5(?:\D|$))\d"
    r"|[ \t]*(?:%|(?:-|\u2013|\+|,(?=\d)|to\b|or\b)[^\w\n]*\d)",
    re.IGNORECASE,
)

_TASK = (
    "Below are an instruction that a person gave to an AI assistant, and the assistant's response. "
    "Judge how well the response serves that person."
)
_SCALE = """Begin at 0 and add a point for each of these statements that is true:
- The response is about what was asked, even if much is missing or beside the point.
- It deals with most of what was asked, though not with all of it.
- The person can use it: whatever is essential in the instruction is answered.
- It is correct, complete and in good order, and it speaks to the person and not about the task.
- It can hardly be improved: expert, as long as it has to be, and nothing in it is superfluous."""
_ANSWER = (
    "Give your reasons in at most three sentences. Then write one last line with the sum of the "
    "points, a whole number from 0 to 5, in this form:\nScore: 0"
)


def build_judge_prompt(instruction: str, response: str) -> Prompt:
    """The request for one judgement of one response.

    Args:
        instruction: what was asked, with its input (`task_text`).
        response: what was answered.
    """
    parts = [
        _TASK,
        f"<asked>\n{instruction}\n</asked>",
        f"<response>\n{response}\n</response>",
        _SCALE,
        _ANSWER,
    ]
    return Prompt([{"role": "user", "content": "\n\n".join(parts)}], None, "", ())


def read_score(text: str) -> float | None:
    """The score that a judgement ends with, from 0 to 5; None where it has none, or no clear one.

    The last line with a ``Score: N`` counts, since a judge may speak of scores before it gives its
    own. Two different ones on that line, or one out of anything but 5, are none.
    """
    found = list(_SCORE.finditer(text))
    last = [one for one in found if "\n" not in text[one.start() : found[-1].start()]]
    if any(_UNSURE.match(text, one.end()) for one in last):
        return None
    scores = {float(one[1]) for one in last}
    score = scores.pop() if len(scores) == 1 else -1.0
    return score if 0 <= score <= HIGHEST else None
