"""The GGUF file of a byte-level tokenizer."""

import json
from pathlib import Path

import numpy as np
from gguf import GGUFWriter, TokenType
from tokenizers import Tokenizer


def write_gguf(path: Path, tokenizer: Tokenizer, **changes: object) -> Path:
    spec = json.loads(tokenizer.to_str())["model"]
    ordered = sorted(spec["vocab"], key=spec["vocab"].__getitem__)
    values: dict[str, object] = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": [*ordered, "<think>"],
        "types": [TokenType.CONTROL] * 3
        + [TokenType.NORMAL] * (len(ordered) - 3)
        + [TokenType.USER_DEFINED],
        "merges": [" ".join(merge) for merge in spec["merges"]],
        "bos": 1,
        "add_bos": True,
        "template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    } | changes
    writer = GGUFWriter(path, "llama")
    for add, number in (
        (writer.add_context_length, 512),
        (writer.add_embedding_length, 8),
        (writer.add_block_count, 1),
        (writer.add_feed_forward_length, 16),
        (writer.add_head_count, 2),
        (writer.add_head_count_kv, 1),
        (writer.add_eos_token_id, 2),
    ):
        add(number)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, write in (
        ("model", writer.add_tokenizer_model),
        ("pre", writer.add_tokenizer_pre),
        ("tokens", writer.add_token_list),
        ("types", writer.add_token_types),
        ("merges", writer.add_token_merges),
        ("bos", writer.add_bos_token_id),
        ("add_bos", writer.add_add_bos_token),
        ("template", writer.add_chat_template),
    ):
        if values[key] is not None:
            write(values[key])
    writer.add_tensor("token_embd.weight", np.zeros((len(ordered) + 1, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
