"""Chats as ids: those of transformers, texts written out by hand, and where a turn stops."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from montessori_jax.data.chat import ChatFormat, EncodedChat, fit
from montessori_jax.data.rows import read_rows
from tests.data.chat.tokenizers import CHATML, EVERY, plain, shipped, talk


@pytest.mark.parametrize("tokenizer", EVERY, indirect=True)
def test_ids_equal_apply_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = ChatFormat(tokenizer)
    more = [
        [{"role": "system", "content": "Answer in French."}, *talk("Hello", "Bonjour")],
        [*talk("One?", "1"), *talk("Two, then 3?\n\n  Or 4?", "2\n\n3")],
    ]
    for messages in [*shipped(), *more]:
        options = {"tokenize": True, "return_dict": False, "chat_template": chat.template}
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, **options)
        whole = tokenizer.apply_chat_template(messages, **options)
        ours = chat.encode(messages)
        assert ours.tokens.dtype == np.int32
        assert chat.encode_prompt(messages[:-1]) == prompt
        assert ours.tokens[: ours.prompt_length].tolist() == prompt
        assert ours.tokens.tolist() == whole[: len(ours.tokens)]
        # What is left out is what the template writes after its last control token.
        assert tokenizer.decode(whole[len(ours.tokens) :]).strip() == ""
        assert ours.tokens[-1] in chat.stop_ids
        assert ours.response_length == len(ours.tokens) - len(prompt) > 1


def test_real_rows_equal_apply_chat_template(
    smollm2_tokenizer: PreTrainedTokenizerFast, shared_data: Path
) -> None:
    chat = ChatFormat(smollm2_tokenizer)
    rows = read_rows(shared_data / "alpaca_seed_999.jsonl").rows
    assert len(rows) > 990
    for row in rows:
        messages = row.conversation()
        theirs = smollm2_tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        ours = chat.encode(messages)
        assert ours.tokens.tolist() == theirs[:-1]  # the newline after <|im_end|>
        prompt = smollm2_tokenizer.apply_chat_template(
            messages[:-1], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert ours.tokens[: ours.prompt_length].tolist() == prompt


def test_smollm2_by_hand(smollm2_tokenizer: PreTrainedTokenizerFast) -> None:
    chat = ChatFormat(smollm2_tokenizer)
    encoded = chat.encode(talk("Hi", "Hello!"))
    prompt = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert smollm2_tokenizer.decode(encoded.tokens[: encoded.prompt_length]) == prompt
    assert smollm2_tokenizer.decode(encoded.tokens[encoded.prompt_length :]) == "Hello!<|im_end|>"
    assert encoded.tokens[-1] == 2
    assert chat.stop_ids == (2,)
    own = [{"role": "system", "content": "Rhyme."}, *talk("Hi", "Hello!")]
    assert smollm2_tokenizer.decode(chat.encode(own).tokens).startswith(
        "<|im_start|>system\nRhyme.<|im_end"
    )


@pytest.mark.parametrize(
    ("tokenizer", "prompt", "response"),
    [
        (
            "chatml",
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\n",
            "Yes.<|im_end|>",
        ),
        (
            "llama3",
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "Yes.<|eot_id|>",
        ),
        ("zephyr", "<|user|>\nHi</s>\n<|assistant|>\n", "Yes.</s>"),
        ("llama2", "<s>[INST] Hi [/INST]", " Yes. </s>"),
        ("phi3", "<|user|>\nHi<|end|>\n<|assistant|>\n", "Yes.<|end|>\n<|endoftext|>"),
        ("bare", "<s>### User:\nHi\n\n### Assistant:\n", "Yes.</s>"),
    ],
    indirect=["tokenizer"],
)
def test_texts_by_hand(tokenizer: PreTrainedTokenizerFast, prompt: str, response: str) -> None:
    encoded = ChatFormat(tokenizer).encode(talk("Hi", "Yes."))
    ids = encoded.tokens.tolist()
    decode = tokenizer.backend_tokenizer.decode
    assert decode(ids, skip_special_tokens=False) == prompt + response
    assert decode(ids[: encoded.prompt_length], skip_special_tokens=False) == prompt


@pytest.mark.parametrize(
    ("tokenizer", "generation", "stops"),
    [
        ("chatml", None, ["<|im_end|>"]),
        ("chatml", {"eos_token_id": 0}, ["<|im_end|>", "<|endoftext|>"]),
        ("llama3", {"eos_token_id": [1, 4]}, ["<|eot_id|>", "<|end_of_text|>"]),
        ("phi3", {}, ["<|end|>", "<|endoftext|>"]),
        ("zephyr", None, ["</s>"]),
        ("llama2", None, ["</s>"]),
        ("bare", None, ["</s>"]),
    ],
    indirect=["tokenizer"],
)
def test_stop_ids(
    tokenizer: PreTrainedTokenizerFast, generation: dict[str, Any] | None, stops: list[str]
) -> None:
    found = ChatFormat(tokenizer, generation).stop_ids
    assert found == tuple(tokenizer.convert_tokens_to_ids(stops))


def test_fit() -> None:
    encoded = EncodedChat(np.arange(10, dtype=np.int32), 6)
    assert fit(encoded, 10) is encoded
    assert fit(encoded, 1024) is encoded
    cut = fit(encoded, 7)
    assert cut is not None
    assert (cut.tokens.tolist(), cut.prompt_length, cut.response_length) == ([*range(7)], 6, 1)
    assert fit(encoded, 6) is None
    assert fit(encoded, 3) is None


def test_documents_are_plain_text_with_the_usual_bos(
    llama3: PreTrainedTokenizerFast, chatml: PreTrainedTokenizerFast
) -> None:
    for text in ("Task: x\n\n1. <|eot_id|>", "plain"):
        ids = plain(llama3, text)
        assert ChatFormat(llama3).encode_text(text) == [llama3.bos_token_id, *ids]
        assert llama3.encode("plain")[0] == llama3.bos_token_id
    assert ChatFormat(chatml).encode_text("a<|im_end|>") == plain(chatml, "a<|im_end|>")


@pytest.mark.parametrize("tokenizer", EVERY, indirect=True)
def test_decode_gives_back_responses(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = ChatFormat(tokenizer)
    for messages in shipped()[:30]:
        encoded = chat.encode(messages)
        response = chat.decode(encoded.tokens[encoded.prompt_length :])
        assert response.strip() == messages[-1]["content"].strip()


def test_settings_of_a_shared_tokenizer_do_not_reach_in(chatml: PreTrainedTokenizerFast) -> None:
    backend = Tokenizer.from_str(chatml.backend_tokenizer.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", chat_template=CHATML
    )
    chat = ChatFormat(tokenizer)
    expected = ChatFormat(chatml).encode(talk("Hi", "Yes.")).tokens.tolist()
    assert chat.encode(talk("Hi", "Yes.")).tokens.tolist() == expected
    tokenizer("Hello there", truncation=True, max_length=2, padding="max_length")
    assert chat.encode(talk("Hi", "Yes.")).tokens.tolist() == expected
