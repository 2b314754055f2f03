"""A random student of a few thousand parameters, as a folder and loaded."""

from pathlib import Path

import jax

from montessori_jax.data.rows import read_rows
from montessori_jax.models import Model, ModelConfig
from montessori_jax.models.folder import load_folder, save_folder
from montessori_jax.models.loaded import LoadedModel
from tests.tiny_world import tiny_tokenizer


def tiny_student(folder: Path, *, positions: int = 512, seed: int = 0) -> LoadedModel:
    """Written to ``folder`` and read from it; it writes random tokens."""
    tokenizer = tiny_tokenizer([row.instruction for row in read_rows("package:seeds").rows])
    config = ModelConfig(
        family="llama",
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
    )
    model = Model(config)
    ends = tokenizer.convert_tokens_to_ids("<|im_end|>")
    params = model.init(jax.random.key(seed))
    save_folder(folder, model, params, tokenizer, {"eos_token_id": ends})
    return load_folder(folder)
