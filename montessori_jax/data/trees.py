"""Conversation trees as instruction rows: each first prompt with its best-ranked reply.

OpenAssistant's data sets (Köpf et al. 2023, arXiv 2304.07327) have a message a row: ``message_id``,
``parent_id`` (null for a first prompt), ``text``, ``role`` (prompter or assistant) and, where
people ranked the replies to one message, ``rank``, 0 the best. What follows a first reply is left
alone: the rows are single turns.
"""

from collections.abc import Iterable, Iterator
from typing import Any

NEEDED = frozenset(["message_id", "parent_id", "text", "role"])
OPTIONAL = frozenset(["rank", "lang", "deleted"])
COLUMNS = ("id", "instruction", "response")
"""What rows have that are made of a tree."""


def is_tree(columns: Iterable[str]) -> bool:
    """Whether a table with these columns holds messages of conversation trees."""
    return set(columns) >= NEEDED


def first_turns(messages: Iterable[Any]) -> Iterator[dict[str, Any] | str]:
    """A row a first prompt, in order, or the reason why it is none.

    Only English ones are taken where ``lang`` says so: what filters generated text here, and the
    reference sets, are English. Unranked replies come after ranked ones, in their order.
    """
    prompts: list[dict[str, Any]] = []
    replies: dict[str, list[dict[str, Any]]] = {}
    for message in messages:
        if not isinstance(message, dict) or message.get("deleted"):
            continue
        if message["parent_id"] is None:
            prompts.append(message)
        else:
            replies.setdefault(message["parent_id"], []).append(message)
    for prompt in prompts:
        if prompt.get("lang") not in (None, "en"):
            yield "the language is not English"
            continue
        answers = [one for one in replies.get(prompt["message_id"], []) if one["text"]]
        if not answers:
            yield "the first prompt has no reply"
            continue
        best = min(answers, key=_rank)
        yield {
            "id": prompt["message_id"],
            "instruction": prompt["text"],
            "response": best["text"],
        }


def _rank(reply: dict[str, Any]) -> float:
    rank = reply.get("rank")
    return float("inf") if rank is None else float(rank)
