"""The servers that write: vLLM, and models behind an address."""

from typing import Literal, Self

from pydantic import model_validator
from pydantic.dataclasses import dataclass

from montessori_jax.config.fields import STRICT, setting


@dataclass(frozen=True, config=STRICT)
class VllmConfig:
    """The vLLM server that generates: started here, or running already."""

    url: str = setting("", "a running vLLM server, http://host:port; empty: one is started")
    api_key_env: str = setting("VLLM_API_KEY", "environment variable with the key of vllm.url")
    python: str = setting(
        "",
        "Python that has vLLM; empty: $MONTESSORI_VLLM_PYTHON, .venv-vllm (make vllm), or this one",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "what the server computes in; auto is bfloat16, on a CPU float32"
    )
    devices: str = setting(
        "", "GPUs of the server's own, as in CUDA_VISIBLE_DEVICES; empty: it shares with training"
    )
    tensor_parallel: int = setting(1, "GPUs that share each layer", ge=1)
    gpu_memory_utilization: float = setting(
        0.9, "share of a GPU that the server takes, weights and cache", gt=0, le=1
    )
    kv_cache_gib: float = setting(4.0, "CPU: memory for keys and values, in GiB", gt=0)
    max_model_len: int = setting(0, "longest sequence in tokens; 0: the model's", ge=0)
    max_num_seqs: int = setting(0, "sequences decoded side by side; 0: vLLM's default", ge=0)
    eager: bool = setting(False, "start sooner and run slower: no compiled graphs")
    arguments: tuple[str, ...] = setting((), "more arguments of vLLM's server")
    handover: Literal["auto", "reload", "restart"] = setting(
        "auto", "how a server takes a tuned teacher: in place where it can, or by a restart"
    )
    stay_up: Literal["auto", "always", "never"] = setting(
        "auto", "keep the server between stages; auto: unless it shares a GPU or TPU with training"
    )
    seeds: Literal["auto", "always", "never"] = setting(
        "auto", "send seeds, so that texts repeat; auto: not on a CPU, where they kill the server"
    )
    concurrency: int = setting(64, "prompts asked for at one time", ge=1)
    startup_seconds: float = setting(900.0, "longest wait for a server to start", gt=0)
    stall_seconds: float = setting(
        300.0, "a server that makes no token for so long is taken for hung", gt=0
    )
    request_seconds: float = setting(3600.0, "longest wait for one prompt's texts", gt=0)
    retries: int = setting(5, "times that a failed request is tried again", ge=0)
    restarts: int = setting(2, "losses of the server in a row, without a text between", ge=0)


@dataclass(frozen=True, config=STRICT)
class Price:
    """Of a model behind an address, in dollars for a million tokens."""

    prompt: float = setting(0.0, "a million prompt tokens", ge=0)
    generated: float = setting(0.0, "a million generated tokens", ge=0)


@dataclass(frozen=True, config=STRICT)
class UrlConfig:
    """A model behind any OpenAI-compatible address, asked by chat messages."""

    base_url: str = setting("https://api.openai.com/v1", "address, with its /v1")
    model: str = setting("gpt-4o", "the model's name there")
    api_key_env: str = setting("OPENAI_API_KEY", "environment variable with the key")
    concurrency: int = setting(16, "prompts asked for at one time", ge=1)
    timeout_seconds: float = setting(300.0, "longest wait for one answer", gt=0)
    retries: int = setting(8, "times that a failed request is tried again", ge=0)
    tokens_field: Literal["max_tokens", "max_completion_tokens"] = setting(
        "max_tokens", "what the length limit is called there"
    )
    seeds: bool = setting(
        True, "send seeds, so that texts may repeat; a vLLM server on a CPU dies of them"
    )
    prices: dict[str, Price] = setting(
        {}, "model -> {prompt, generated}: dollars for a million tokens"
    )

    @model_validator(mode="after")
    def _address_has_no_secret(self) -> Self:
        if "@" in self.base_url or "?" in self.base_url:
            raise ValueError(
                "base_url is written into the run's files: leave out user, password and query, "
                "and give a key by api_key_env"
            )
        return self


@dataclass(frozen=True, config=STRICT)
class JudgeConfig(UrlConfig):
    """Who judges what others wrote."""

    base_url: str = setting(
        "", "address of the judge, with its /v1; empty: the teacher judges, where a method can"
    )
