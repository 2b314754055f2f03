"""Local data influence: how much one optimizer step on a sample lowers a reference loss.

For any JAX model and any optax optimizer: `local_influence` with a `Reference` (or `single_batch`)
and `Candidate`s. For this project's decoders: `score_candidates` and `audit_scores`. The pieces
(`candidate_update`, `Reference.gradient`, `agreement`, `noise_floor`) are usable alone.
"""

from montessori_jax.influence.agreement import Agreement, agreement
from montessori_jax.influence.audit import Audit, audit_scores
from montessori_jax.influence.chats import MeanLoss, TokenLosses, chat_candidate, chat_reference
from montessori_jax.influence.exact import exact
from montessori_jax.influence.first_order import first_order
from montessori_jax.influence.local import METHODS, local_influence
from montessori_jax.influence.memory import block_size
from montessori_jax.influence.noise import noise_floor
from montessori_jax.influence.reference import Reference, single_batch
from montessori_jax.influence.scores import Candidate, Score, Scorer
from montessori_jax.influence.scoring import score_candidates
from montessori_jax.influence.step import candidate_update, zero_gradient_update

__all__ = [
    "METHODS",
    "Agreement",
    "Audit",
    "Candidate",
    "MeanLoss",
    "Reference",
    "Score",
    "Scorer",
    "TokenLosses",
    "agreement",
    "audit_scores",
    "block_size",
    "candidate_update",
    "chat_candidate",
    "chat_reference",
    "exact",
    "first_order",
    "local_influence",
    "noise_floor",
    "score_candidates",
    "single_batch",
    "zero_gradient_update",
]
