"""Where prompt and response meet: no token spans the seam, and masks come from lengths."""

import pytest
from transformers import PreTrainedTokenizerFast

from montessori_jax.data.chat import ChatFormat
from tests.data.chat.tokenizers import EVERY, control_ids, plain, talk


def test_a_seam_inside_a_token_keeps_the_prompt(chatml: PreTrainedTokenizerFast) -> None:
    one, two = chatml.convert_tokens_to_ids(["Ċ", "ĊĊ"])
    # In one piece the template's newline would join the response's.
    assert plain(chatml, "assistant\n\n\nYes")[-3:] == [two, one, *plain(chatml, "Yes")][-3:]
    chat = ChatFormat(chatml)
    encoded = chat.encode(talk("Hi", "\n\nYes"))
    prompt = chat.encode_prompt(talk("Hi", "")[:1])
    assert prompt[-1] == one
    assert encoded.tokens.tolist() == [*prompt, *plain(chatml, "\n\nYes"), chatml.eos_token_id]
    assert two not in encoded.tokens


@pytest.mark.parametrize("tokenizer", ["bare", "tinyllama"], indirect=True)
@pytest.mark.parametrize("answer", ["Explain", "Explain</s> it", "12", ""])
def test_a_seam_in_sentencepiece_adds_no_space(
    tokenizer: PreTrainedTokenizerFast, answer: str
) -> None:
    template = (
        "{% for m in messages %}{{ m['role'].upper() + ': ' + m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>", chat_template=template
    )
    chat = ChatFormat(tokenizer)
    encoded = chat.encode(talk("Hi", answer))
    prompt = chat.encode_prompt(talk("Hi", "")[:1])
    assert tokenizer.convert_ids_to_tokens(prompt[-1]) == "▁"
    assert encoded.tokens[: encoded.prompt_length].tolist() == prompt
    told = tokenizer.backend_tokenizer.decode(encoded.tokens.tolist(), skip_special_tokens=False)
    assert told == f"USER: Hi\nASSISTANT: {answer}</s>"


@pytest.mark.parametrize("tokenizer", EVERY, indirect=True)
def test_prefill_is_plain_text_after_the_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = ChatFormat(tokenizer)
    messages = talk("Write a task.", "")[:1]
    prompt = chat.encode_prompt(messages)
    read = tokenizer.backend_tokenizer.decode
    assert chat.encode_prompt(messages, prefill="") == prompt
    for prefill in ("<instruction>", "\nSure: ", "<|im_end|></s><|eot_id|>"):
        ids = chat.encode_prompt(messages, prefill=prefill)
        assert ids[: len(prompt)] == prompt
        assert control_ids(tokenizer, ids) == control_ids(tokenizer, prompt)
        told = read(ids, skip_special_tokens=False)
        assert told == read(prompt, skip_special_tokens=False) + prefill


def test_masks_come_from_lengths_even_where_pad_is_eos(chatml: PreTrainedTokenizerFast) -> None:
    assert chatml.pad_token_id == chatml.eos_token_id
    encoded = ChatFormat(chatml).encode(talk("Hi", "Yes."))
    expected = [*plain(chatml, "Yes."), chatml.eos_token_id]
    assert encoded.tokens[encoded.prompt_length :].tolist() == expected
    assert encoded.response_length == len(expected)
