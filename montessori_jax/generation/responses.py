"""What is kept of a response that ran into the length limit."""

import re
from typing import Literal

Unfinished = Literal["trim", "keep", "drop"]

# A sentence ends at . ! or ? (with closing quotes or brackets) before white space, or at a line's
# end; the dot of a list's number ("2.") ends nothing.
_END = re.compile(r"(?<!\b\d)(?<!\b\d\d)[.!?][\"')\]]*(?=\s|$)|(?<=\S)(?=\n)")


def finished_part(text: str, finish: str, unfinished: Unfinished) -> str:
    """The response to learn from, or "" when there is none.

    A text that ended by itself is kept, without white space around it. One that was cut off at
    the length limit (``finish == "length"``) teaches a student to stop in mid-sentence, so by
    ``trim`` it ends at its last whole sentence, by ``drop`` it goes, by ``keep`` it stays.
    """
    text = text.strip()
    if finish != "length" or unfinished == "keep":
        return text
    if unfinished == "drop":
        return ""
    ends = [match.end() for match in _END.finditer(text)]
    return text[: ends[-1]].rstrip() if ends else ""
