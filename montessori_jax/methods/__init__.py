"""The methods that a run can follow, by the name that ``method`` has in its config.

Each is one function in a file of its own: one time round the loop, from the iteration's teacher to
the next one, as stages of `montessori_jax.loop.Loop`. A further one is a function and a line here.
"""

from collections.abc import Callable
from dataclasses import dataclass

from montessori_jax.loop import Loop
from montessori_jax.methods.llm2llm import llm2llm
from montessori_jax.methods.montessori import montessori
from montessori_jax.methods.no_finetuning import no_finetuning
from montessori_jax.methods.self_instruct import self_instruct
from montessori_jax.methods.self_reward import self_reward

__all__ = ["METHODS", "Method"]


@dataclass(frozen=True)
class Method:
    """A method and what the run has to know of it.

    Attributes:
        iterate: one time round; returns the next teacher.
        writes_first: the first stage in which the teacher writes; "" where none writes.
        tunes: whether the teacher is tuned, for which its weights have to be here.
        goes_round: whether a second time round does more than the first.
    """

    iterate: Callable[[Loop], str]
    writes_first: str
    tunes: bool = False
    goes_round: bool = True


METHODS = {
    "montessori": Method(montessori, "generate", tunes=True),
    "no_finetuning": Method(no_finetuning, "", goes_round=False),
    "self_instruct": Method(self_instruct, "synthesise-untuned", goes_round=False),
    "self_reward": Method(self_reward, "generate", tunes=True),
    "llm2llm": Method(llm2llm, "expand"),
}
