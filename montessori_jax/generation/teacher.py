"""A model that writes: its generator, and what a stage must know of it beside."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import jax

from montessori_jax.config import MeshConfig, Price, ResponseConfig, SamplingConfig
from montessori_jax.data.chat import ChatFormat
from montessori_jax.dtypes import compute_dtype, forward_dtype
from montessori_jax.generation.generator import Generator
from montessori_jax.generation.sampler import JaxSampler
from montessori_jax.mesh import sampling_mesh, write_together
from montessori_jax.models.sources import load_model


@dataclass(frozen=True)
class Teacher:
    """What writes text in a generation stage.

    Attributes:
        name: what the user called it.
        fingerprint: changes whenever its texts may.
        generator: writes.
        back_end: what the generator is, in a word: ``jax``, ``vllm`` or ``url``.
        chat: turns prompts into ids; None where the other side has its own tokenizer.
        positions: longest sequence; None where that is not known.
        parameters: their number, for counting operations; 0 where it is not known.
        computes_in: a stage's ``dtype`` setting -> the dtype that it is computed in.
        price: of tokens; None where none is charged.
        seeded: whether texts are fixed by the seed.
        together: whether the processes of a job write each text together.
    """

    name: str
    fingerprint: str
    generator: Generator
    back_end: str
    chat: ChatFormat | None
    positions: int | None
    parameters: int
    computes_in: Callable[[str], str]
    price: Price | None = None
    seeded: bool = True
    together: bool = False


class Teachers(Protocol):
    """Makes teachers of models, by their names."""

    def teacher(self, source: str) -> Teacher:
        """``source`` ready to write; the one before it may be gone."""
        ...

    def check(self, source: str) -> None:
        """Refuse now what `teacher` would refuse after hours of other work."""
        ...

    def release(self) -> None:
        """Free the accelerator for a stage that needs it."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...


@dataclass(frozen=True)
class JaxTeachers:
    """Teachers that write by the built-in sampler, in this process."""

    instructions: SamplingConfig
    responses: ResponseConfig
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def teacher(self, source: str) -> Teacher:
        loaded = load_model(
            source,
            dtype=forward_dtype(self.instructions, self.responses),
            mesh=sampling_mesh(self.mesh),
        )
        chat = ChatFormat.of(loaded)
        return Teacher(
            name=loaded.name,
            fingerprint=loaded.fingerprint,
            generator=JaxSampler(loaded.model, loaded.params, chat),
            back_end="jax",
            chat=chat,
            positions=loaded.model.config.max_position_embeddings,
            parameters=loaded.model.parameter_count(),
            computes_in=compute_dtype,
            together=write_together(self.mesh, jax.local_device_count(), jax.device_count()),
        )

    def check(self, source: str) -> None:
        """Models are loaded as they are asked for."""

    def release(self) -> None:
        """Nothing is kept between stages."""

    def close(self) -> None:
        """Nothing is kept between stages."""
