"""What judges are asked: prompts in FastChat's format, read from a file that the user names."""

import re
from dataclasses import dataclass

from montessori_jax.data.sources import open_records
from montessori_jax.errors import UserError

_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class JudgePrompt:
    """A system prompt and the template of the user's turn, with fields in braces."""

    name: str
    system: str
    template: str


def read_judge_prompts(path: str, names: tuple[str, ...]) -> dict[str, JudgePrompt]:
    """The prompts of these names in a ``judge_prompts.jsonl``.

    Raises:
        UserError: the file cannot be read, or lacks one of them.
    """
    found: dict[str, JudgePrompt] = {}
    for number, record in open_records(path).items:
        if not isinstance(record, dict) or not all(
            isinstance(record.get(key), str) for key in ("name", "system_prompt", "prompt_template")
        ):
            raise UserError(
                f"{path}: row {number} has no name, system_prompt and prompt_template: give "
                "FastChat's judge_prompts.jsonl"
            )
        found[record["name"]] = JudgePrompt(
            record["name"], record["system_prompt"], record["prompt_template"]
        )
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(f"{path}: no prompt called {', '.join(missing)}; it has {', '.join(found)}")
    return {name: found[name] for name in names}


def fill(prompt: JudgePrompt, fields: dict[str, str]) -> list[dict[str, str]]:
    """The prompt as chat messages. What is filled in is not looked at for fields again.

    Raises:
        UserError: the template has a field that is not among ``fields``.
    """

    def value(found: re.Match[str]) -> str:
        if found[1] not in fields:
            raise UserError(
                f"judge prompt {prompt.name}: unknown field {{{found[1]}}}; it can have "
                f"{', '.join(fields)}"
            )
        return fields[found[1]]

    user = {"role": "user", "content": _FIELD.sub(value, prompt.template)}
    return [{"role": "system", "content": prompt.system}, user] if prompt.system else [user]
