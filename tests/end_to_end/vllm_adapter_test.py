"""An adapter that we wrote, loaded by vLLM itself: the same tokens and log-probs as ours.

Runs where ``MONTESSORI_VLLM_PYTHON`` names the interpreter of an environment with vLLM; a server
takes minutes to start. `compare` is also how the figures of docs/log.md were made by hand.
"""

import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from montessori_jax.models import Model, Params
from montessori_jax.models.adapter_folder import load_adapter, save_adapter
from montessori_jax.models.folder import load_folder
from montessori_jax.models.lora import LoraModel, LoraSpec, adapter_shapes
from tests.models.tiny import CONFIG, write_folder

VLLM = os.environ.get("MONTESSORI_VLLM_PYTHON", "")
ADAPTER = "tuned"


@contextmanager
def server(base: Path, adapter: Path, rank: int, log: Path) -> Iterator[Callable[..., Any]]:
    """vLLM with ``base`` (called ``base``) and ``adapter`` on it; yields ``post(path, body)``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(VLLM, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base)),
        *("--served-model-name", "base", "--host", "127.0.0.1", "--port", str(port)),
        *("--max-model-len", "512", "--max-num-seqs", "8", "--dtype", "float32"),
        *("--enforce-eager", "--enable-lora", "--max-lora-rank", str(max(8, rank))),
        *("--lora-modules", f"{ADAPTER}={adapter}"),
    ]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "OMP_NUM_THREADS": "2",
    }

    def post(path: str, body: dict[str, Any] | None = None) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.loads(answer.read() or "{}")

    with open(log, "w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            deadline = time.monotonic() + 500
            while True:
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                try:
                    post("/v1/models")
                    break
                except OSError:
                    time.sleep(1)
            yield post
        finally:
            process.terminate()
            process.wait(timeout=60)


def greedy(post: Callable[..., Any], model: str, prompt: Sequence[int], tokens: int) -> Any:
    """Ids that vLLM writes at temperature 0, and their log-probs."""
    body = {"model": model, "prompt": list(prompt), "max_tokens": tokens, "temperature": 0}
    body |= {"logprobs": 1, "return_tokens_as_token_ids": True, "ignore_eos": True}
    [choice] = post("/v1/completions", body)["choices"]
    found = choice["logprobs"]
    ids = [int(token.removeprefix("token_id:")) for token in found["tokens"]]
    return ids, np.array(found["token_logprobs"])


def log_probs(model: Model, params: Params, ids: Sequence[int], start: int) -> np.ndarray:
    """Of every next token from place ``start`` on: ``[len(ids) - start, vocab]``."""
    tokens = jnp.asarray(ids, jnp.int32)[None]
    places = jnp.arange(len(ids), dtype=jnp.int32)[None]
    hidden = model.hidden(params, tokens, jnp.ones_like(tokens), places)
    return np.asarray(jax.nn.log_softmax(model.logits(params, hidden[0, start - 1 : -1]), axis=-1))


def compare(
    base: Path, adapter: Path, prompts: Sequence[Sequence[int]], log: Path, tokens: int = 16
) -> dict[str, float]:
    """Greedy text of vLLM with the adapter, measured by our adapted and our merged model.

    Returns the largest difference of a log-prob from either, the largest between vLLM with and
    without the adapter on the first token, and how many tokens are our own greedy choice too.
    """
    loaded = load_folder(base, name="base")
    spec, params = load_adapter(adapter, loaded.model)
    adapted = LoraModel(loaded.model.config, loaded.params, spec)
    merged = adapted.merged(params)
    result = {"tokens": 0, "ours_too": 0, "adapted": 0.0, "merged": 0.0, "base": 0.0, "moved": 0.0}
    with server(base, adapter, spec.rank, log) as post:
        for prompt in prompts:
            ids, found = greedy(post, ADAPTER, prompt, tokens)
            whole = [*prompt, *ids]
            ours = log_probs(adapted, params, whole, len(prompt))
            joined = log_probs(loaded.model, merged, whole, len(prompt))
            picked = np.arange(len(ids)), np.array(ids)
            result["tokens"] += len(ids)
            result["ours_too"] += int((ours.argmax(-1) == ids).sum())
            result["adapted"] = max(result["adapted"], float(np.abs(ours[picked] - found).max()))
            result["merged"] = max(result["merged"], float(np.abs(joined[picked] - found).max()))
            plain, without = greedy(post, "base", prompt, tokens)
            untuned = log_probs(loaded.model, loaded.params, [*prompt, *plain], len(prompt))
            difference = np.abs(untuned[np.arange(len(plain)), np.array(plain)] - without)
            result["base"] = max(result["base"], float(difference.max()))
            # What the adapter does to the token that vLLM writes first with it.
            result["moved"] = max(result["moved"], float(abs(untuned[0, ids[0]] - found[0])))
    return result


@pytest.mark.slow
@pytest.mark.skipif(not VLLM, reason="set MONTESSORI_VLLM_PYTHON to a python that has vLLM")
@pytest.mark.parametrize("rslora", [False, True], ids=["alpha/r", "alpha/sqrt(r)"])
def test_vllm_writes_with_the_adapter_what_ours_writes(rslora: bool, tmp_path: Path):
    config = CONFIG | {"hidden_size": 128, "intermediate_size": 192, "head_dim": 64,
                       "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 256,
                       "max_position_embeddings": 512}  # fmt: skip
    base = write_folder(tmp_path / "base", config)
    model = load_folder(base, name="base").model
    spec = LoraSpec(4, 16.0, rslora=rslora)
    noise = iter(jax.random.split(jax.random.key(1), 100))
    adapter = jax.tree.map(
        lambda leaf: 0.1 * jax.random.normal(next(noise), leaf.shape), adapter_shapes(model, spec)
    )
    save_adapter(tmp_path / "adapter", model, adapter, spec, base="base")
    prompts = np.random.default_rng(3).integers(3, 256, (5, 24)).tolist()
    found = compare(base, tmp_path / "adapter", prompts, tmp_path / "vllm.log")
    assert found["tokens"] == found["ours_too"] == 80
    assert max(found["base"], found["adapted"], found["merged"]) < 1e-3
    assert found["moved"] > 0.1
