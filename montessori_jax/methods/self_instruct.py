"""Self-Instruct (Wang et al. 2023, arXiv 2212.10560): the teacher as it is writes the data.

The same prompts, filters, budget and draws as the untuned branch of the other methods. The teacher
may be a model behind an address.
"""

from montessori_jax.loop import Loop
from montessori_jax.methods.teaching import synthesise, train_and_evaluate


def self_instruct(loop: Loop) -> str:
    """Synthesise, train, evaluate."""
    train_and_evaluate(loop, {"untuned": synthesise(loop, "untuned", loop.teacher)})
    return loop.teacher
