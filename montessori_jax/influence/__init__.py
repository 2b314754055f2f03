"""Local data influence: how much one optimizer step on a sample lowers a reference loss.

For any JAX model and any optax optimizer: `local_influence` with a `Reference` (or `single_batch`)
and `Candidate`s; `METHODS` are its estimators. For this project's decoders: `score_candidates` and
`choose_estimator`. The pieces (`candidate_update`, `Reference.gradient`, `Reference.hvp`,
`token_contributions`, `agreement`, `noise_floor`, `select`) are usable alone.
"""

from montessori_jax.influence.agreement import Agreement, agreement
from montessori_jax.influence.audit import Audit, Choice, audit, choose_method
from montessori_jax.influence.chats import MeanLoss, TokenLosses, chat_candidate, chat_reference
from montessori_jax.influence.local import METHODS, local_influence
from montessori_jax.influence.memory import block_size
from montessori_jax.influence.noise import noise_floor
from montessori_jax.influence.probe import Probe
from montessori_jax.influence.reference import Reference, single_batch
from montessori_jax.influence.scores import (
    Candidate,
    Measured,
    Score,
    Scorer,
    measured_score,
    unmeasured,
)
from montessori_jax.influence.scoring import (
    Student,
    candidates_of,
    choose_estimator,
    probe_of,
    score_candidates,
)
from montessori_jax.influence.selection import Selection, bounds, select
from montessori_jax.influence.step import candidate_update, zero_gradient_update
from montessori_jax.influence.tokens import token_contributions
from montessori_jax.mesh import make_mesh

__all__ = [
    "METHODS",
    "Agreement",
    "Audit",
    "Candidate",
    "Choice",
    "MeanLoss",
    "Measured",
    "Probe",
    "Reference",
    "Score",
    "Scorer",
    "Selection",
    "Student",
    "TokenLosses",
    "agreement",
    "audit",
    "block_size",
    "bounds",
    "candidate_update",
    "candidates_of",
    "chat_candidate",
    "chat_reference",
    "choose_estimator",
    "choose_method",
    "local_influence",
    "make_mesh",
    "measured_score",
    "noise_floor",
    "probe_of",
    "score_candidates",
    "select",
    "single_batch",
    "token_contributions",
    "unmeasured",
    "zero_gradient_update",
]
