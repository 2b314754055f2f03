"""A judge behind any OpenAI-compatible address: what was judged is never asked or paid again."""

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from montessori_jax.config import JudgeConfig, Price
from montessori_jax.data.rows import Message
from montessori_jax.errors import UserError
from montessori_jax.runs import Journal, value_hash
from montessori_jax.serving.environment import key_for
from montessori_jax.serving.requests import (
    Garbled,
    Patience,
    Refused,
    ServerLost,
    ask,
    open_client,
    stream,
)
from montessori_jax.work import Work

# Statuses that may be about one question alone: its content, its length, a field of it.
ABOUT_THE_QUESTION = frozenset([400, 413, 422])
REFUSED = "refused"  # how a judgement ended that was not made


@dataclass(frozen=True)
class Question:
    """What a judge is asked: chat messages, and the other fields of the request.

    ``options`` has ``max_tokens`` (sent by the name that the address wants), ``temperature`` and
    whatever else, such as ``logprobs``.
    """

    messages: tuple[Message, ...]
    options: dict[str, Any]

    @cached_property
    def id(self) -> str:
        """The same for the same question, whenever it is asked."""
        return value_hash([self.messages, self.options])


@dataclass(frozen=True)
class Judgement:
    """An answer of the judge.

    ``logprobs`` is the answer's field of that name as OpenAI lays it out, None where it has none;
    ``text`` is what a tool was called with where one was. A question that the judge refused has
    no text, and ``finish`` is `REFUSED`.
    """

    id: str
    text: str
    finish: str
    logprobs: dict[str, Any] | None
    prompt_tokens: int
    generated_tokens: int


@dataclass(frozen=True)
class Judge:
    """A model that judges.

    Attributes:
        settings: address, model, patience and prices.
        key: bearer token; "" sends none.
    """

    settings: JudgeConfig
    key: str = field(repr=False)

    @classmethod
    def of(cls, settings: JudgeConfig) -> "Judge":
        """The judge that the settings name; `UserError` where they name none."""
        if not settings.base_url:
            raise UserError(
                "this evaluation needs a judge: set judge.base_url (any OpenAI-compatible "
                "address, with its /v1) and judge.model"
            )
        return cls(settings, key_for(settings))

    @property
    def name(self) -> str:
        return self.settings.model

    def ask(
        self, questions: Sequence[Question], journal: Path, work: Work, *, label: str
    ) -> dict[str, Judgement]:
        """Judgements by the questions' ids; those in the journal are not asked for again.

        Equal questions are asked once. Tokens and money of what is asked are counted. A question
        that is refused for what it is (`ABOUT_THE_QUESTION`) has an empty judgement, unless no
        question of the journal has been answered yet: then all would be refused.

        Args:
            questions: in any number; asked ``settings.concurrency`` at a time.
            journal: JSONL file with a line a judgement. It belongs to one judge.
            work: counts, shows progress, and may want to stop.
            label: what the bar says.

        Raises:
            Refused: the address refuses the first question, or any for another reason than what
                it asks.
            UserError: the address does not answer; or the journal is another judge's.
        """
        record = Journal(journal, {"judge": self.name})
        known = {one["id"]: Judgement(**one) for one in record.records}
        wanted = {question.id: question for question in questions}
        waiting = [question for name, question in wanted.items() if name not in known]
        tried = any(one.finish != REFUSED for one in known.values())
        reasons: list[str] = []
        answers = self._answers(waiting, reasons, tried=tried)
        done = len(wanted) - len(waiting)
        try:
            with (
                work.bar(len(wanted), "judgement", label, done) as bar,
                contextlib.closing(answers),
            ):
                for found in answers:
                    record.append(asdict(found))
                    known[found.id] = found
                    work.meter.count(
                        dollars=self.dollars([found]),
                        judge_prompt_tokens=found.prompt_tokens,
                        judge_generated_tokens=found.generated_tokens,
                    )
                    bar.update()
                    work.stop.check()
        except ServerLost as lost:
            raise UserError(
                f"the judge at {self.settings.base_url} does not answer ({lost}); what was judged "
                "is kept, and the same command goes on from there"
            ) from None
        except Refused as refused:
            raise Refused(f"{refused}: {self._advice(refused)}", refused.http_status) from None
        if reasons:
            work.say(f"{label}: {len(reasons)} refused, not to be parsed, such as: {reasons[0]}")
        return {name: known[name] for name in wanted}

    def _answers(
        self, questions: Sequence[Question], reasons: list[str], *, tried: bool
    ) -> Generator[Judgement, None, None]:
        """Judgements as they come; why questions were refused is added to ``reasons``.

        Where the judge has not been ``tried`` the first question is asked before the others.
        """
        if not tried:
            yield from self._stream(questions[:1], None)
            questions = questions[1:]
        yield from self._stream(questions, reasons)

    def _stream(
        self, questions: Sequence[Question], reasons: list[str] | None
    ) -> Generator[Judgement, None, None]:
        """Judgements as they come; with no ``reasons`` to add to, no question may be refused."""
        client = open_client(self.settings.base_url.rstrip("/"), self.key)
        patience = Patience(self.settings.retries, self.settings.timeout_seconds)

        async def one(question: Question) -> Judgement:
            body = self.body(question)
            try:
                return await ask(
                    client, "/chat/completions", body, lambda answer: read(answer, question.id),
                    patience,
                )  # fmt: skip
            except Refused as refused:
                if reasons is None or refused.http_status not in ABOUT_THE_QUESTION:
                    raise
                reasons.append(str(refused))
                return Judgement(question.id, "", REFUSED, None, 0, 0)

        return stream(questions, one, concurrency=self.settings.concurrency, clean_up=client.aclose)

    def _advice(self, refused: Refused) -> str:
        """What to do about it."""
        if refused.http_status in (401, 403):
            return f"set {self.settings.api_key_env} to a key that may use {self.name}"
        if refused.http_status == 404:
            return "set judge.base_url (with its /v1) and judge.model to what is served there"
        return (
            "set judge.model and judge.tokens_field to what it takes; what was judged is kept, and "
            "the same command goes on from there"
        )

    def body(self, question: Question) -> dict[str, Any]:
        """The request's JSON."""
        options = dict(question.options)
        limit = options.pop("max_tokens")
        return {
            "model": self.settings.model,
            "messages": list(question.messages),
            self.settings.tokens_field: limit,
            **options,
        }

    def dollars(self, judgements: Sequence[Judgement]) -> float:
        """What they cost by the price table; 0 for a model that is not in it."""
        price = self.settings.prices.get(self.settings.model) or Price()
        prompted = sum(one.prompt_tokens for one in judgements)
        generated = sum(one.generated_tokens for one in judgements)
        return (price.prompt * prompted + price.generated * generated) / 1e6

    def cost(self, judgements: Sequence[Judgement]) -> dict[str, Any]:
        """What they took altogether, for a result file.

        ``dollars`` is None for a judge without a price.
        """
        priced = self.settings.model in self.settings.prices
        return {
            "judge": self.name,
            "judgements": len(judgements),
            "refused": sum(one.finish == REFUSED for one in judgements),
            "prompt_tokens": sum(one.prompt_tokens for one in judgements),
            "generated_tokens": sum(one.generated_tokens for one in judgements),
            "dollars": round(self.dollars(judgements), 6) if priced else None,
        }


def read(answer: Any, name: str) -> Judgement:
    """The judgement in an answer's JSON; `Garbled` where it is not all there."""
    try:
        choice = answer["choices"][0]
        message = choice["message"]
        called = message.get("tool_calls")
        text = called[0]["function"]["arguments"] if called else message.get("content") or ""
        usage = answer.get("usage") or {}
        logprobs = choice.get("logprobs")
        if logprobs is not None:
            content = [_token(one) for one in logprobs.get("content") or ()]
            logprobs = {"content": content} if content else None
        made = Judgement(
            id=name,
            text=text,
            finish=str(choice.get("finish_reason")),
            logprobs=logprobs,
            prompt_tokens=int(usage.get("prompt_tokens") or 0),
            generated_tokens=int(usage.get("completion_tokens") or 0),
        )
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise Garbled(f"{type(error).__name__}: {error}") from None
    if not isinstance(made.text, str):
        raise Garbled("a choice whose content is no text")
    return made


def _token(one: dict[str, Any]) -> dict[str, Any]:
    """A token's log-probs without the bytes that servers repeat them as."""
    others = [{"token": top["token"], "logprob": top["logprob"]} for top in one["top_logprobs"]]
    return {"token": one["token"], "logprob": one["logprob"], "top_logprobs": others}
