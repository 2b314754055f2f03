"""Whether a server has the weights that it should: log-probs of a few texts, its own and ours.

A DPO stage leaves ``probe.json`` beside the teacher that it exports: greedy texts of the teacher
before it was tuned, with the trainer's log-probs of their tokens before and after. A server that
was handed the new weights must give the latter.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import httpx
import numpy as np

from montessori_jax.errors import UserError
from montessori_jax.runs import write_json
from montessori_jax.serving.requests import bearer, error_text

FILE = "probe.json"
# Largest mean difference of a log-prob in nats by the server's dtype. Measured on SmolLM2 in
# float32: 1e-5; bfloat16 rounds logits near 20 by up to 0.06.
TOLERANCE = {"float32": 0.01, "bfloat16": 0.1}
# A change of weights below this cannot be told from rounding.
VISIBLE = {"float32": 1e-3, "bfloat16": 0.05}


@dataclass(frozen=True)
class ProbeText:
    """A text and the log-probs in nats of its tokens from ``start`` on.

    ``after`` by the model that it is a probe of, ``before`` by the one that must be told apart.
    """

    tokens: list[int]
    start: int
    before: list[float]
    after: list[float]


class WrongWeights(UserError):
    """A server that does not serve what it should, or does not answer when it is asked."""


@dataclass(frozen=True)
class HandOver:
    """Mean absolute differences of log-probs: of the server from the new and the old weights, and
    of those two from each other."""

    from_new: float
    from_old: float
    moved: float
    tokens: int


def write_probe(folder: Path, model: str, base: str, texts: Sequence[ProbeText]) -> None:
    """Write ``probe.json`` into ``folder``, for the fingerprints of a tuned model and its base."""
    values = {"model": model, "base": base, "texts": [asdict(text) for text in texts]}
    write_json(folder / FILE, values)


@dataclass
class Probes:
    """Probes met so far, by the fingerprint of the model that they tell of.

    A tuned model's probe tells of its base as well, whose log-probs are the ones before.
    """

    known: dict[str, list[ProbeText]] = field(default_factory=dict)

    def of(self, folder: Path, fingerprint: str) -> list[ProbeText]:
        """The texts for a model, from ``folder``'s probe if it is one of it; none if unknown."""
        try:
            values = json.loads((folder / FILE).read_text(encoding="utf-8"))
            texts = [ProbeText(**text) for text in values["texts"]]
            model, base = str(values["model"]), str(values["base"])
        except (OSError, ValueError, LookupError, TypeError):
            texts, model, base = [], "", ""
        if texts and model == fingerprint:
            self.known[model] = texts
            self.known.setdefault(
                base, [replace(one, before=one.after, after=one.before) for one in texts]
            )
        return self.known.get(fingerprint, [])


def server_log_probs(client: httpx.Client, model: str, text: ProbeText) -> np.ndarray:
    """The server's log-probs of the tokens from ``text.start`` on: float64, in nats."""
    body = {
        "model": model, "prompt": text.tokens, "max_tokens": 1, "temperature": 0,
        "prompt_logprobs": 0,
    }  # fmt: skip
    try:
        answer = client.post("/v1/completions", json=body)
    except httpx.HTTPError as error:
        raise WrongWeights(f"vLLM does not answer the probe ({error!r})") from None
    if answer.is_error:
        raise WrongWeights(f"vLLM refused the probe: {answer.status_code} {error_text(answer)}")
    try:
        found = answer.json()["choices"][0]["prompt_logprobs"]
        pairs = zip(found[text.start :], text.tokens[text.start :], strict=True)
        return np.array([place[str(token)]["logprob"] for place, token in pairs])
    except (ValueError, LookupError, TypeError) as error:
        raise WrongWeights(f"vLLM's answer to the probe has no log-probs ({error!r})") from None


def check_hand_over(
    url: str, key: str, model: str, texts: Sequence[ProbeText], *, dtype: str, name: str
) -> HandOver:
    """Compare the server's log-probs with the trainer's.

    Raises:
        WrongWeights: they differ by more than ``dtype`` explains, or are nearer to the old weights
            than to the new ones; with both numbers.
    """
    with httpx.Client(base_url=url, headers=bearer(key), timeout=600.0) as client:
        served = np.concatenate([server_log_probs(client, model, text) for text in texts])
    new = np.concatenate([text.after for text in texts])
    old = np.concatenate([text.before for text in texts])
    found = HandOver(
        from_new=float(np.abs(served - new).mean()),
        from_old=float(np.abs(served - old).mean()),
        moved=float(np.abs(new - old).mean()),
        tokens=len(served),
    )
    stale = found.moved > VISIBLE[dtype] and found.from_old < found.from_new
    if stale or not found.from_new <= TOLERANCE[dtype]:
        raise WrongWeights(
            f"vLLM does not serve {name}: mean log-prob of {found.tokens} tokens is "
            f"{served.mean():.4f} there and {new.mean():.4f} by the trainer, {found.from_new:.4f} "
            f"nats a token apart ({TOLERANCE[dtype]} is allowed in {dtype}), and "
            f"{found.from_old:.4f} from the weights before"
        )
    return found
