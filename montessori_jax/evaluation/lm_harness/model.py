"""Our models as a model class of lm-evaluation-harness.

What is computed is what the harness's own class for transformers (`HFLM`, 0.4.13) computes: how a
context and its continuation become token ids, which end is cut where they are too long, how a
long text is read in windows, what begins and ends a text. How it is computed is ours.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from montessori_jax import cluster
from montessori_jax.config import HarnessConfig, MeshConfig, SamplingConfig
from montessori_jax.config_file import build
from montessori_jax.costs import Meter
from montessori_jax.device_memory import fits_in_memory
from montessori_jax.errors import UserError
from montessori_jax.evaluation.continuations import Continuation, score
from montessori_jax.generation.generator import PromptRequest
from montessori_jax.generation.sampler import JaxSampler
from montessori_jax.mesh import make_mesh
from montessori_jax.models.loaded import LoadedModel
from montessori_jax.models.sources import load_model
from montessori_jax.runs import Journal, value_hash
from montessori_jax.work import Work

# What a task may say of how its texts are drawn.
DRAWING = ("temperature", "top_p", "top_k", "repetition_penalty")


@register_model("montessori")
class MontessoriLM(TemplateLM):
    """A loaded model, for `lm_eval.evaluate`; or by name: ``--model montessori``.

    Args:
        pretrained: a model, or what `load_model` takes: a folder, ``hf:org/name``, ``wheel:...``.
        settings: lengths and batch sizes; by default made of the arguments below.
        dtype: compute dtype, ``float32`` or ``bfloat16``.
        attention: see `Model.hidden`.
        work: bars, meter, stop flag and seed; by default of the current folder, writing nothing.
        journal: answers are kept in it, and those that are in it are not computed again.
        add_bos_token: whether texts begin with a bos; by default as the tokenizer does it.
        batch_size: ``prompts_per_batch`` of the settings, by the harness's name; ``auto`` leaves
            it as it is.
        device: not used, nor ``max_batch_size``: JAX has its devices, and the mesh is data x
            ``fsdp`` x ``tensor``.
        **lengths: any of `HarnessConfig`'s ``max_length``, ``max_gen_toks`` and
            ``tokens_per_pass``.
    """

    def __init__(
        self,
        pretrained: str | LoadedModel,
        *,
        settings: HarnessConfig | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        attention: str = "auto",
        work: Work | None = None,
        journal: Journal | None = None,
        add_bos_token: bool | None = None,
        batch_size: int | str | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
        data: int = 0,
        fsdp: int = 1,
        tensor: int = 1,
        **lengths: int,
    ) -> None:
        super().__init__()
        if settings is None:
            if batch_size is not None and str(batch_size).isdigit():
                lengths["prompts_per_batch"] = int(batch_size)
            settings = build(HarnessConfig, lengths, "model_args")
        if isinstance(pretrained, str):
            mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
            pretrained = load_model(pretrained, dtype=dtype, mesh=mesh)
        self.loaded, self.settings = pretrained, settings
        self.tokenizer = pretrained.tokenizer
        self.dtype, self.attention = dtype, attention
        self.work = work or Work(Path(), 0, Meter(None, "lm_harness"))
        self.journal, self.add_bos_token = journal, add_bos_token
        self.max_length = settings.max_length or pretrained.model.config.max_position_embeddings
        self._known = {one["request"]: one["answer"] for one in journal.records} if journal else {}
        self._sampler = JaxSampler(pretrained.model, pretrained.params, Texts.of(pretrained))

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: bos, or else eos."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.loaded.fingerprint

    def get_model_info(self) -> dict[str, Any]:
        """What the harness notes of a model."""
        return {
            "model_num_parameters": self.loaded.model.parameter_count(),
            "model_dtype": self.dtype,
            "model_revision": self.loaded.name,
            "model_sha": self.loaded.fingerprint,
        }

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as the tokenizer's template writes it.

        Raises:
            UserError: the tokenizer has none.
        """
        if not self.tokenizer.chat_template:
            raise UserError(
                f"{self.loaded.name} has no chat template: leave harness.chat_template off"
            )
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **options: Any
    ) -> list[int]:
        """Token ids; a bos that the text begins with already is not written twice."""
        begun = self.tokenizer.decode(self.prefix_token_id)
        return self._encode(string, add_special_tokens, begun)

    def _encode(self, text: str, special: bool | None, begun: str | None) -> list[int]:
        if special is None:
            special = False if begun and text.startswith(begun) else self.add_bos_token
        chosen = {} if special is None else {"add_special_tokens": special}
        return self.tokenizer.encode(text, **chosen)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Of each continuation after its context, and whether greedy decoding would write it."""
        return super().loglikelihood(requests, disable_tqdm=True)  # the bar is of what takes time

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **options: Any,
    ) -> list[tuple[float, bool]]:
        names = _names("loglikelihood", [[list(texts)] for texts, _, _ in requests])
        pairs = [Continuation(context, tokens) for _, context, tokens in requests]

        def tell(index: int, answer: list[Any]) -> None:
            self.cache_hook.add_partial("loglikelihood", requests[index][0], tuple(answer))

        answers = self._score("loglikelihood", names, pairs, tell)
        return [(total, greedy) for total, greedy in answers]

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Of whole texts; what is longer than the model's positions is read in windows."""
        texts = [one.args[0] for one in requests]
        pairs, owners = [], []
        for owner, text in enumerate(texts):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in map(make_disjoint_window, windows):
                pairs.append(Continuation(*window))
                owners.append(owner)
        within = Counter[int]()
        asked = []
        for owner in owners:
            asked.append([texts[owner], within[owner]])
            within[owner] += 1
        names = _names("loglikelihood_rolling", asked)
        answers = self._score("loglikelihood_rolling", names, pairs, lambda index, answer: None)
        totals = [0.0] * len(texts)
        for owner, (total, _) in zip(owners, answers, strict=True):
            totals[owner] += total
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def _score(
        self, kind: str, names: list[str], pairs: Sequence[Continuation], tell: Any
    ) -> list[list[Any]]:
        """``[log-likelihood, greedy]`` of each pair; ``tell`` is told of those that are new."""
        asked: dict[str, int] = {}
        for index, name in enumerate(names):
            asked.setdefault(name, index)
        left = [index for name, index in asked.items() if name not in self._known]
        settings = self.settings
        advice = f"lower harness.tokens_per_pass (now {settings.tokens_per_pass})"
        model = self.loaded.model
        with (
            fits_in_memory(kind, advice),
            self.work.bar(len(asked), "request", kind, len(asked) - len(left)) as bar,
        ):
            passes = score(
                model,
                self.loaded.params,
                [pairs[index] for index in left],
                max_length=self.max_length,
                tokens_per_pass=settings.tokens_per_pass,
                dtype=self.dtype,
                attention=self.attention,
            )
            for scored, tokens in passes:
                answers = {left[one.request]: [one.log_likelihood, one.greedy] for one in scored}
                self._keep({names[index]: answer for index, answer in answers.items()})
                for index, answer in answers.items():
                    tell(index, answer)
                self.work.meter.count(
                    scored_tokens=tokens, flops=2.0 * model.parameter_count() * tokens
                )
                bar.update(len(scored))
                self.work.check_stop()
        return self._answers(names)

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts up to a stop string, the end of a turn or a length; greedy unless the task says
        otherwise.

        Raises:
            UserError: the job has several processes, whose mesh the sampler cannot use; or the
                task's ``generation_kwargs`` cannot be followed.
        """
        if cluster.count() > 1:
            raise UserError(
                "tasks that write text take one process: leave them out of harness.tasks, and run "
                "them with montessori evaluate"
            )
        asked = [one.args for one in requests]
        # Each repetition of a request is a text of its own, where it is drawn by chance.
        repeated = Counter[str]()
        names = []
        for name in _names("generate_until", [list(args) for args in asked]):
            names.append(f"{name}-{repeated[name]}")
            repeated[name] += 1
        alike: dict[str, list[int]] = {}
        for index, (_, options) in enumerate(asked):
            if names[index] not in self._known:
                alike.setdefault(json.dumps(options, sort_keys=True), []).append(index)
        done = len(names) - sum(map(len, alike.values()))
        with self.work.bar(len(names), "text", "generate_until", done) as bar:
            for members in alike.values():
                settings, until = self._drawing(asked[members[0]][1])
                for index, text in self._write(
                    [(i, asked[i][0]) for i in members], settings, until
                ):
                    self._keep({names[index]: text})
                    self.cache_hook.add_partial("generate_until", asked[index], text)
                    bar.update()
                    self.work.check_stop()
        return self._answers(names)

    def _drawing(self, options: dict[str, Any]) -> tuple[SamplingConfig, list[str]]:
        """How a task's texts are drawn and what ends them."""
        given: dict[str, Any] = dict(normalize_gen_kwargs(options, self.settings.max_gen_toks))
        until, most = given.pop("until"), given.pop("max_gen_toks")
        if not given.pop("do_sample"):
            given = {key: value for key, value in given.items() if key not in DRAWING[:3]}
            given["temperature"] = 0.0
        if unknown := given.keys() - set(DRAWING):
            raise UserError(
                f"generation_kwargs of a task: {', '.join(sorted(unknown))}: only until, "
                f"max_gen_toks, do_sample, {', '.join(DRAWING)} are known: remove it"
            )
        if most >= self.max_length:
            raise UserError(
                f"a task's texts of {most} tokens leave no room for a prompt in the model's "
                f"{self.max_length} positions: lower the task's max_gen_toks"
            )
        settings = SamplingConfig(
            **given,
            max_tokens=most,
            prompts_per_batch=self.settings.prompts_per_batch,
            dtype=self.dtype,
        )
        return settings, until

    def _write(
        self, prompts: Sequence[tuple[int, str]], settings: SamplingConfig, until: list[str]
    ) -> Any:
        """Yield ``(index, text)`` of each prompt, the longest first."""
        room = self.max_length - settings.max_tokens
        encoded = {
            index: self._encode(text, None, self.tokenizer.bos_token)[-room:]
            for index, text in prompts
        }
        order = sorted(encoded, key=lambda index: (-len(encoded[index]), index))
        requests = [PromptRequest(str(i), tuple(encoded[i]), row=i) for i in order]
        advice = f"lower harness.prompts_per_batch (now {self.settings.prompts_per_batch})"
        texts = self._sampler.chat
        with fits_in_memory("generate_until", advice):
            for [made] in self._sampler.generate(
                requests, settings, samples=1, stop=tuple(until), seed=self.work.seed % 2**32
            ):
                tokens = made.prompt_tokens + made.generated_tokens
                self.work.meter.count(
                    prompt_tokens=made.prompt_tokens,
                    generated_tokens=made.generated_tokens,
                    flops=2.0 * self.loaded.model.parameter_count() * tokens,
                )
                written = made.tokens[:-1] if made.finish == "end" else made.tokens
                text = postprocess_generated_text(texts.decode(written), until, None)
                yield int(made.prompt_id), text

    def _answers(self, names: list[str]) -> list[Any]:
        """The answers by name, which are forgotten unless there is a journal."""
        found = [self._known[name] for name in names]
        if self.journal is None:
            self._known.clear()
        return found

    def _keep(self, answers: dict[str, Any]) -> None:
        self._known |= answers
        if self.journal is not None:
            self.journal.append(*({"request": k, "answer": v} for k, v in answers.items()))


def _names(kind: str, asked: Sequence[list[Any]]) -> list[str]:
    """What the journal calls requests: the same for the same."""
    return [value_hash([kind, one]) for one in asked]


@dataclass(frozen=True)
class Texts:
    """Tells where a text ends, as transformers does: no turns, only the model's ends of a text."""

    tokenizer: Any
    stop_ids: tuple[int, ...]

    @classmethod
    def of(cls, loaded: LoadedModel) -> "Texts":
        ends = loaded.generation.get("eos_token_id")
        ends = ends if isinstance(ends, list) else [ends]
        found = [one for one in [*ends, loaded.tokenizer.eos_token_id] if one is not None]
        return cls(loaded.tokenizer, tuple(dict.fromkeys(found)))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, special tokens left out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)
