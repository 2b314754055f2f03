"""Conversations -> token ids by the model's own chat template, and where the response begins."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from montessori_jax.data.rows import Message
from montessori_jax.errors import UserError
from montessori_jax.models.loaded import LoadedModel

# For models that bring no template. Turns are headed by "### Role:" on a line of its own and end
# with an empty line; the assistant's text is closed by the end-of-sequence token. A tokenizer that
# begins every text with a bos token gets it here too, once.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'].capitalize() + ':\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\n\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)

# Llama 3.1's template dates its system prompt "26 Jul 2024" unless told otherwise; later ones write
# today's date. Every template gets 3.1's day: a run that goes on after midnight must not change.
DATE = "26 Jul 2024"
_FIXED_CLOCK = (
    "{%- macro strftime_now(format) -%}"
    "{{ '26 July 2024' if '%B' in format else '" + DATE + "' }}"
    "{%- endmacro %}{{ '' }}"
)

# Private-use characters, one of which breaks up control strings that stand in people's text.
_MARKS = range(0xF0000, 0xFFFFE)


class ChatError(UserError):
    """A conversation that the model's chat template cannot write, or not with a clear response."""


@dataclass(frozen=True, eq=False)
class EncodedChat:
    """A conversation as ids; the loss falls on ``tokens[prompt_length:]``.

    Attributes:
        tokens: int32 [length], prompt and response, the end of the assistant's turn included.
        prompt_length: number of leading tokens that generation would be given.
    """

    tokens: np.ndarray
    prompt_length: int

    @property
    def response_length(self) -> int:
        """Number of tokens that count in the loss, at least 1."""
        return len(self.tokens) - self.prompt_length


def fit(encoded: EncodedChat, max_length: int) -> EncodedChat | None:
    """``encoded`` cut to ``max_length`` tokens; None when that leaves no token of the response.

    Only the response is ever cut: what is left of it is still conditioned on the whole prompt.
    """
    if len(encoded.tokens) <= max_length:
        return encoded
    if encoded.prompt_length >= max_length:
        return None
    return EncodedChat(encoded.tokens[:max_length], encoded.prompt_length)


class ChatFormat:
    """A tokenizer's chat template, applied to conversations.

    A conversation is a list of ``{"role": ..., "content": ...}``. Ids equal those of transformers'
    ``apply_chat_template``, with two exceptions that are on purpose:

    - Strings like ``<|im_end|>`` or ``</s>`` in people's text (roles, contents, prefills) become
      the ids of plain text, never control tokens. Only tokens that the tokenizer marks as special
      count; reasoning tags and the like that it lists as ordinary tokens stay tokens.
    - Templates that ask for the date always get 26 July 2024.

    The prompt of a training row has exactly the ids that generation is given, so what follows a
    prompt is encoded apart from it where the two would merge into one token.

    Args:
        tokenizer: fast tokenizer; later changes to it have no effect here.
        generation: of the model's ``generation_config.json``; its ``eos_token_id`` is read.
        require_template: refuse a tokenizer without a template instead of ``DEFAULT_TEMPLATE``.

    Raises:
        UserError: no usable template, or none and no end-of-sequence token for the default one.
    """

    template: str

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        generation: Mapping[str, Any] | None = None,
        *,
        require_template: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.name = tokenizer.name_or_path or "the model"
        ends = (generation or {}).get("eos_token_id")
        self._generation_ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        # An own copy: transformers switches truncation and padding on shared ones by each call.
        self._encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._encoder.no_truncation()
        self._encoder.no_padding()
        self._plain_encoders: dict[str, Tokenizer] = {}
        special = [
            token.content
            for token in tokenizer.added_tokens_decoder.values()
            if token.special and token.content
        ]
        longest_first = sorted(special, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        # The bos id where the tokenizer begins every text of its own with one.
        bos = tokenizer.bos_token_id
        self._bos = [bos] * (bos is not None and self._encoder.encode("a").ids[:1] == [bos])
        self.template = self._find_template(require_template)
        clock = _FIXED_CLOCK if "strftime_now" in self.template else ""
        self._dated_template = clock + self.template

    @classmethod
    def of(cls, loaded: LoadedModel) -> "ChatFormat":
        """The format of a loaded model, its generation config's stop ids included."""
        return cls(loaded.tokenizer, loaded.generation)

    def encode_prompt(self, messages: Sequence[Message], *, prefill: str = "") -> list[int]:
        """Ids that generation starts from: the conversation and the head of the answer's turn.

        Args:
            messages: at least one, usually ending with the user's.
            prefill: plain text that the answer is made to begin with.

        Raises:
            ChatError: the template refuses the messages.
        """
        mark = self._mark(messages, prefill)
        text = self._render(messages, mark, prompt=True)
        ids = self._encode(text, mark)
        return self._extend(text, ids, self._guard(prefill, mark), mark) if prefill else ids

    def encode_text(self, text: str) -> list[int]:
        """Ids of ``text`` as a document of its own: no template, plain text, a bos if usual."""
        mark = self._mark([], text)
        return [*self._bos, *self._encode(self._guard(text, mark), mark)]

    def encode(self, messages: Sequence[Message]) -> EncodedChat:
        """A whole conversation that ends with the assistant's response.

        The response runs through the end of the turn as the template writes it; white space that
        the template puts after the last control token is left out, as no model generates it.

        Raises:
            ChatError: the last message is not the assistant's, the template refuses the messages,
                or it writes the response's turn differently than the head it gives to generation.
        """
        if len(messages) < 2 or messages[-1].get("role") != "assistant":
            raise ChatError("a training conversation needs a prompt and ends with role 'assistant'")
        mark = self._mark(messages)
        prompt = self._render(messages[:-1], mark, prompt=True)
        whole = self._render(messages, mark, prompt=False)
        if not whole.startswith(prompt):
            raise ChatError(
                f"the chat template of {self.name} writes the assistant's turn differently than it "
                f"prompts for it ({_differing(prompt, whole)}): give a template whose generation "
                "prompt is the beginning of that turn"
            )
        response = self._through_end_of_turn(whole[len(prompt) :])
        if not response:
            raise ChatError(f"the chat template of {self.name} leaves nothing of the response")
        ids = self._encode(prompt, mark)
        tokens = self._extend(prompt, ids, response, mark)
        return EncodedChat(np.asarray(tokens, np.int32), len(ids))

    def encode_answer(
        self, prompt: Sequence[Message] | str, answer: str, *, prefill: str = ""
    ) -> EncodedChat:
        """A prompt and what was generated after it and after ``prefill``; the loss falls on that.

        The ids of the prompt are those that generation was given. A chat's answer runs through
        the end of its turn; plain text has none, so the answer to it is the text alone.

        Raises:
            ChatError: see `encode`; or the answer has no tokens.
        """
        if isinstance(prompt, str):
            ids = self.encode_text(prompt + prefill)
            mark = self._mark([], prompt + prefill + answer)
            start, more = self._guard(prompt + prefill, mark), self._guard(answer, mark)
            tokens = self._extend(start, ids[len(self._bos) :], more, mark)
            tokens = [*self._bos, *tokens]
        else:
            ids = self.encode_prompt(prompt, prefill=prefill)
            turns = [*prompt, {"role": "assistant", "content": prefill + answer}]
            mark = self._mark(turns)
            head = self._render(prompt, mark, prompt=True)
            whole = self._render(turns, mark, prompt=False)
            start = head + self._guard(prefill, mark)
            if not whole.startswith(start):
                raise ChatError(
                    f"the chat template of {self.name} writes the assistant's turn differently "
                    f"than it prompts for it ({_differing(start, whole)})"
                )
            more = self._through_end_of_turn(whole[len(start) :])
            tokens = self._extend(start, ids, more, mark)
        if len(tokens) == len(ids):
            raise ChatError("the answer has no tokens")
        return EncodedChat(np.asarray(tokens, np.int32), len(ids))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of ``ids``, control tokens left out."""
        ids = [int(token) for token in ids]
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return str(self.tokenizer.decode(ids, **options))

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end generation: the template's end of turn, the tokenizer's eos, the model's."""
        reply = "xyz"
        turns = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": reply}]
        whole = self._render(turns, "", prompt=False)
        end = self._control.search(whole.rpartition(reply)[2]) if reply in whole else None
        found = [] if end is None else [self.tokenizer.convert_tokens_to_ids(end[0])]
        if self.tokenizer.eos_token_id is not None:
            found.append(self.tokenizer.eos_token_id)
        return tuple(dict.fromkeys([*found, *self._generation_ends]))

    def _find_template(self, required: bool) -> str:
        if self.tokenizer.chat_template:
            try:
                return self.tokenizer.get_chat_template()
            except ValueError as error:  # several named templates, none of them the default
                raise UserError(f"{self.name} has no default chat template: {error}") from error
        if required:
            raise UserError(
                f"no chat template in {self.name}: add chat_template.jinja, or a chat_template in "
                "tokenizer_config.json"
            )
        if self.tokenizer.eos_token is None:
            raise UserError(
                f"{self.name} has neither a chat template nor an eos token to end a turn with: "
                "set chat_template or eos_token in its tokenizer_config.json"
            )
        return "{{ bos_token }}" * len(self._bos) + DEFAULT_TEMPLATE

    def _mark(self, messages: Sequence[Message], prefill: str = "") -> str:
        """Character that breaks up control strings in these texts; "" when there is none."""
        texts = [text for message in messages for text in message.values()]
        texts.append(prefill)
        if not any(map(self._control.search, texts)):
            return ""
        together = "".join(texts)
        return next(chr(code) for code in _MARKS if chr(code) not in together)

    def _guard(self, text: str, mark: str) -> str:
        """``text`` without control strings: each has the mark after its first character."""
        while mark and self._control.search(text):  # again, for strings that overlapped
            text = self._control.sub(lambda found: _broken(found[0], mark), text)
        return text

    def _render(self, messages: Sequence[Message], mark: str, *, prompt: bool) -> str:
        guarded = [
            {key: self._guard(text, mark) for key, text in message.items()} for message in messages
        ]
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    guarded,
                    chat_template=self._dated_template,
                    tokenize=False,
                    add_generation_prompt=prompt,
                    date_string=DATE,
                )
            )
        except (TemplateError, TypeError, ValueError) as error:
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise ChatError(
                f"the chat template of {self.name} refuses a conversation of roles "
                f"({roles}): {' '.join(str(error).split())}"
            ) from error

    def _encode(self, text: str, mark: str) -> list[int]:
        if not mark or mark not in text:
            return self._encoder.encode(text, add_special_tokens=False).ids
        if mark not in self._plain_encoders:
            self._plain_encoders[mark] = _without(mark, self._encoder)
        return self._plain_encoders[mark].encode(text, add_special_tokens=False).ids

    def _extend(self, prompt: str, prompt_ids: list[int], more: str, mark: str) -> list[int]:
        """Ids of ``prompt + more`` that begin with ``prompt_ids``."""
        whole = self._encode(prompt + more, mark)
        if whole[: len(prompt_ids)] == prompt_ids:
            return whole
        # The seam fell inside a token. Sentencepiece puts a space before a text of its own, so
        # behind a newline is the other way to encode the rest; take the one that reads right.
        newline = self._encode("\n", "")
        behind = self._encode("\n" + more, mark)
        ways = [prompt_ids + self._encode(more, mark)]
        if behind[: len(newline)] == newline:
            ways.append(prompt_ids + behind[len(newline) :])
        wanted = self._text(whole)
        return next((ids for ids in ways if self._text(ids) == wanted), ways[0])

    def _text(self, ids: list[int]) -> str:
        return self._encoder.decode(ids, skip_special_tokens=False)

    def _through_end_of_turn(self, text: str) -> str:
        end = max((found.end() for found in self._control.finditer(text)), default=len(text))
        return text[:end] if not text[end:].strip() else text


def _broken(control: str, mark: str) -> str:
    """A control string that no longer reads as one; `_without` makes it whole again."""
    if len(control) == 1:
        return f"{mark}{ord(control)}{mark}"
    return control[0] + mark + control[1:]


def _without(mark: str, encoder: Tokenizer) -> Tokenizer:
    """``encoder`` undoing `_broken` after it has looked for control tokens and before all else.

    So the text is split into words and merged as it was written: its ids, and those of the text
    around it, are the ones of plain text.
    """
    spec = json.loads(encoder.to_str())
    undo = []
    for token in spec["added_tokens"]:
        if token["special"]:
            # Tokens looked for in normalised text would be found again once the mark is gone.
            token["normalized"] = False
            if len(token["content"]) == 1:
                undo.append((_broken(token["content"], mark), token["content"]))
    steps = [
        {"type": "Replace", "pattern": {"String": found}, "content": content}
        for found, content in [*undo, (mark, "")]
    ]
    if spec["normalizer"] is not None:
        steps.append(spec["normalizer"])
    spec["normalizer"] = {"type": "Sequence", "normalizers": steps}
    return Tokenizer.from_str(json.dumps(spec))


def _differing(prompt: str, whole: str) -> str:
    same = next(
        (i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(whole)
    )
    return f"{prompt[same : same + 40]!r} becomes {whole[same : same + 40]!r}"
