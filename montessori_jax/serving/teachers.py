"""Teachers behind servers, and which back-end a run uses."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from montessori_jax import cluster
from montessori_jax.config import RunConfig, UrlConfig
from montessori_jax.devices import local_platform
from montessori_jax.errors import UserError
from montessori_jax.generation.teacher import JaxTeachers, Teacher, Teachers
from montessori_jax.runs import value_hash
from montessori_jax.serving.chat import ChatGenerator
from montessori_jax.serving.environment import environment_for, find_environment, key_for
from montessori_jax.serving.vllm_teachers import RunningVllmTeachers, VllmTeachers
from montessori_jax.stopping import Stop

Say = Callable[[str], None]
BackEnd = Literal["jax", "vllm", "url"]


def choose_back_end(config: RunConfig) -> BackEnd:
    """What ``generator`` stands for here; asks for the accelerator only where it must."""
    if config.generator != "auto":
        return config.generator
    if config.vllm.url:
        return "vllm"
    if cluster.count() > 1:
        return "jax"
    found = find_environment(config.vllm)
    if found is None or found.platform == "cpu" or local_platform() == "cpu":
        return "jax"
    return "vllm"


def shares_accelerator(config: RunConfig, back_end: BackEnd) -> bool:
    """Whether a server of ours needs the accelerator that training needs."""
    if back_end != "vllm" or config.vllm.url:
        return False
    platform = environment_for(config.vllm).platform
    if platform == "cuda" and config.vllm.devices:
        _check_apart(config.vllm.devices, os.environ.get("CUDA_VISIBLE_DEVICES"))
    return platform == "tpu" or (platform == "cuda" and not config.vllm.devices)


def _check_apart(devices: str, visible: str | None) -> None:
    """Refuse GPUs of the server's own that training would take as well."""
    own = {one.strip() for one in devices.split(",")}
    if visible is None or own & {one.strip() for one in visible.split(",")}:
        raise UserError(
            f"vllm.devices {devices}: training would take these GPUs too: set CUDA_VISIBLE_DEVICES "
            "to the others before you start"
        )


def open_teachers(
    config: RunConfig, back_end: BackEnd, logs: Path, *, say: Say, stop: Stop
) -> Teachers:
    """What makes teachers in a run; nothing is started or loaded yet.

    Raises:
        UserError: the back-end lacks something, or settings need another one.
    """
    if config.generation.structured and back_end != "vllm":
        raise UserError(
            f"generation.structured needs vLLM and the generator is {back_end}: set generator: "
            "vllm, or generation.structured: false"
        )
    if back_end == "jax":
        return JaxTeachers(config.generation, config.responses, config.mesh)
    if back_end == "url":
        return UrlTeachers(config.url)
    if config.vllm.url:
        return RunningVllmTeachers(config.vllm, say=say, stop=stop)
    tuning = config.bootstrap if config.optimise == "bootstrap" else config.dpo
    return VllmTeachers(
        config.vllm,
        logs,
        lora_rank=tuning.lora_rank,
        shared=shares_accelerator(config, back_end),
        jax_fraction=config.jax_memory_fraction,
        say=say,
        stop=stop,
    )


@dataclass
class UrlTeachers:
    """The model behind an address; it has no weights that could be handed over."""

    settings: UrlConfig

    def teacher(self, source: str) -> Teacher:
        key = key_for(self.settings)
        asked = [self.settings.base_url, self.settings.model]
        return Teacher(
            name=self.settings.model,
            fingerprint=value_hash(asked),
            generator=ChatGenerator(self.settings, key),
            back_end="url",
            chat=None,
            positions=None,
            parameters=0,
            computes_in=lambda dtype: "unknown",
            price=self.settings.prices.get(self.settings.model),
            seeded=False,
        )

    def check(self, source: str) -> None:
        """Refuse an address that needs a key and has none; more cannot be known without asking."""
        key_for(self.settings)

    def release(self) -> None:
        """Nothing here uses the accelerator."""

    def close(self) -> None:
        """Connections are closed with each stage."""
