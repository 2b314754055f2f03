"""Self-Rewarding Language Models (Yuan et al. 2024, arXiv 2401.10020), as a way to tune a teacher.

The teacher answers its own instructions several times, a judge scores the responses from 0 to 5,
the best against the worst is a preference pair, and DPO makes the next teacher of it, which writes
the student's data. The judge is the teacher itself, or a model behind an address. The student has
no say in it.
"""

from montessori_jax.loop import Loop
from montessori_jax.methods.preferring import compete_in_responses, judge_scores, prefer, tune
from montessori_jax.methods.teaching import (
    synthesise_with_tuned,
    train_and_evaluate,
    write_data,
)
from montessori_jax.report import lines


def self_reward(loop: Loop) -> str:
    """One time round; returns the tuned teacher's folder."""
    prompts = loop.config.generation.prompts
    loop.stage("generate", write_data(loop, loop.teacher, prompts), lines.generated)
    candidates = compete_in_responses(loop, loop.folder("generate"))
    pairs = prefer(loop, candidates, judge_scores(loop, candidates))
    tuned = tune(loop, [pairs])
    train_and_evaluate(loop, synthesise_with_tuned(loop, tuned))
    return tuned
