"""A tiny teacher and student that really write instructions: trained here, in seconds."""

from collections.abc import Sequence
from pathlib import Path

import jax
from transformers import PreTrainedTokenizerFast

from montessori_jax.config import SftConfig
from montessori_jax.data.chat import ChatFormat
from montessori_jax.data.rows import Row, read_rows
from montessori_jax.generation.judging import build_judge_prompt
from montessori_jax.generation.prompts import (
    CLOSING_TAG,
    OPENING_TAG,
    build_expansion_prompt,
    build_instruction_prompt,
    choose_exemplars,
)
from montessori_jax.models import Model, ModelConfig
from montessori_jax.models.folder import save_folder
from montessori_jax.training.sft import train_sft
from tests.byte_level import train_byte_level

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 2,000 tokens with ChatML's control tokens."""
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return PreTrainedTokenizerFast(
        tokenizer_object=train_byte_level(texts, 2000, control),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=TEMPLATE,
    )


def write_tiny_teacher(
    folder: Path,
    prompts: int = 400,
    head_dim: int = 16,
    other_tasks: int = 0,
    style: str = "turns",
) -> Path:
    """Train a 0.2M-parameter model on the shipped seeds until it writes in their format.

    It is asked in ``style``. vLLM has attention for a ``head_dim`` of 32 and more. With examples of
    ``other_tasks`` to learn from it judges, too, and expands what it is shown.
    """
    seeds: list[Row] = read_rows("package:seeds").rows
    instructions = [row.instruction for row in seeds]
    tokenizer = tiny_tokenizer([*instructions, *(row.response for row in seeds)])
    chat = ChatFormat(tokenizer)
    opening = "" if style == "turns" else OPENING_TAG  # no prefilled answer has it
    chats = []
    for index in range(prompts):
        exemplars = choose_exemplars(
            instructions, [], seed=7, prompt_index=index, num_seed=2, num_generated=0
        )
        prompt = build_instruction_prompt(style, exemplars[:1])
        answer = opening + exemplars[1] + CLOSING_TAG
        chats.append(chat.encode_answer(prompt.messages, answer, prefill=prompt.prefill))
        chats.append(chat.encode(seeds[index % len(seeds)].conversation()))
    for index in range(other_tasks):
        row, other = seeds[index % len(seeds)], seeds[(index + 1) % len(seeds)]
        judged = build_judge_prompt(row.instruction[:60], row.response[:60])
        chats.append(chat.encode_answer(judged.messages, f"Score: {index % 6}"))
        shown = build_expansion_prompt(style, row.instruction)
        answer = opening + other.instruction + CLOSING_TAG
        chats.append(chat.encode_answer(shown.messages, answer, prefill=shown.prefill))
    config = ModelConfig(
        family="llama",
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=head_dim,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    model = Model(config)
    settings = SftConfig(
        learning_rate=8e-3, final_learning_rate=4e-4, batch_size=16, remat="none", epochs=2,
        micro_batch=4 if other_tasks else 16, max_length=768 if other_tasks else 256,
    )  # fmt: skip
    state = train_sft(model, model.init(jax.random.key(0)), chats, settings, seed=0)
    ends = tokenizer.convert_tokens_to_ids("<|im_end|>")
    save_folder(folder, model, state.params, tokenizer, {"eos_token_id": ends})
    return folder
