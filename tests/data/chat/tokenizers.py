"""The chat tests' templates, byte-level tokenizers trained here, and what they ask of each."""

from typing import Any

import numpy as np
from tokenizers import Regex, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from montessori_jax.data.rows import Message, read_rows
from tests.byte_level import train_byte_level

# Fixtures of conftest.py, one for each kind of tokenizer.
EVERY = ["chatml", "llama3", "phi3", "zephyr", "llama2", "tinyllama", "bare", "smollm2_tokenizer"]
# Each template is written for these tests in the manner of the model family it is named after.
CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}"
    "{{ (bos_token if loop.first else '') + '<|start_header_id|>' + m['role'] }}"
    "{{ '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set turns = messages %}{% set system = '' %}{% endif %}"
    "{% for m in turns %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def shipped() -> list[list[Message]]:
    return [
        row.conversation()
        for name in ("seeds", "reference", "heldout")
        for row in read_rows(f"package:{name}").rows
    ]


def texts() -> list[str]:
    return [message["content"] for chat in shipped() for message in chat]


def talk(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def byte_level(
    specials: list[str], *, split: str | None = None, **options: Any
) -> PreTrainedTokenizerFast:
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)]
    if split is not None:
        steps.insert(0, pre_tokenizers.Split(Regex(split), behavior="isolated"))
    cut = pre_tokenizers.Sequence(steps)
    tokenizer = train_byte_level([*texts(), *["a\n\n\nb"] * 100], 700, specials, cut)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def with_template(tokenizer: PreTrainedTokenizerFast, template: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token=tokenizer.eos_token,
        chat_template=template,
    )


def plain(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def control_ids(tokenizer: PreTrainedTokenizerFast, ids: list[int] | np.ndarray) -> list[int]:
    control = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return [int(token) for token in ids if int(token) in control]
