"""The default template, templates of every kind, and those that cannot be used."""

import pytest
from transformers import PreTrainedTokenizerFast

from montessori_jax.data.chat import DATE, DEFAULT_TEMPLATE, ChatError, ChatFormat
from montessori_jax.errors import UserError
from tests.data.chat.tokenizers import CHATML, talk, with_template


def test_default_template_by_hand(bare: PreTrainedTokenizerFast) -> None:
    chat = ChatFormat(bare)
    assert chat.template == "{{ bos_token }}" + DEFAULT_TEMPLATE
    messages = [{"role": "system", "content": "Be brief."}, *talk("Hi", "Yes."), *talk("So?", "No")]
    encoded = chat.encode(messages)
    text = (
        "<s>### System:\nBe brief.\n\n### User:\nHi\n\n### Assistant:\nYes.</s>\n\n"
        "### User:\nSo?\n\n### Assistant:\nNo</s>"
    )
    read = bare.backend_tokenizer.decode
    assert read(encoded.tokens.tolist(), skip_special_tokens=False) == text
    assert encoded.tokens.tolist().count(bare.bos_token_id) == 1
    response = encoded.tokens[encoded.prompt_length :].tolist()
    assert read(response, skip_special_tokens=False) == "No</s>"


def test_default_template_writes_no_bos_where_the_tokenizer_adds_none(
    chatml: PreTrainedTokenizerFast,
) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=chatml.backend_tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
    )
    chat = ChatFormat(tokenizer)
    assert chat.template == DEFAULT_TEMPLATE
    assert chatml.decode(chat.encode_prompt(talk("Hi", "")[:1])) == (
        "### User:\nHi\n\n### Assistant:\n"
    )


def test_missing_templates_are_named(
    bare: PreTrainedTokenizerFast, chatml: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(UserError, match=r"no chat template in .*sentencepiece") as caught:
        ChatFormat(bare, require_template=True)
    assert "\n" not in str(caught.value)
    nothing = PreTrainedTokenizerFast(tokenizer_object=chatml.backend_tokenizer)
    nothing.eos_token = None
    with pytest.raises(UserError, match="neither a chat template nor an eos token"):
        ChatFormat(nothing)


def test_named_templates(chatml: PreTrainedTokenizerFast) -> None:
    assert ChatFormat(with_template(chatml, {"default": CHATML, "rag": "x"})).template == CHATML
    with pytest.raises(UserError, match="no default chat template"):
        ChatFormat(with_template(chatml, {"rag": "x", "tool_use": "y"}))


def test_templates_that_refuse(
    llama2: PreTrainedTokenizerFast, chatml: PreTrainedTokenizerFast
) -> None:
    chat = ChatFormat(llama2)
    with pytest.raises(ChatError, match=r"\(user, user\): roles must alternate"):
        chat.encode_prompt([*talk("a", "")[:1], *talk("b", "")[:1]])
    with pytest.raises(ChatError, match="ends with role 'assistant'"):
        chat.encode(talk("a", "b")[:1])
    with pytest.raises(ChatError, match="needs a prompt"):
        chat.encode(talk("a", "b")[1:])
    with pytest.raises(ChatError, match="empty conversation"):
        chat.encode_prompt([])
    with pytest.raises(ChatError, match=r"unexpected|syntax|expected"):
        ChatFormat(with_template(chatml, "{% for m in messages %}")).encode(talk("a", "b"))
    mute = with_template(chatml, "{% for m in messages[:1] %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(ChatError, match="leaves nothing of the response"):
        ChatFormat(mute).encode(talk("a", "b"))


def test_a_generation_prompt_that_training_does_not_write(chatml: PreTrainedTokenizerFast) -> None:
    """DeepSeek-R1's kind: generation opens a thinking block, the training turn has none."""
    template = CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif")
    chat = ChatFormat(with_template(chatml, template))
    with pytest.raises(ChatError, match=r"'<think>\\n' becomes 'Yes\.<\|im_end\|>\\n'") as caught:
        chat.encode(talk("Hi", "Yes."))
    assert "\n" not in str(caught.value)


def test_a_training_turn_with_more_than_the_generation_prompt(
    chatml: PreTrainedTokenizerFast,
) -> None:
    """Qwen3's kind: the training turn begins with an empty thinking block; it is learned."""
    template = CHATML.replace(
        "m['role'] + '\n' + m['content']",
        "m['role'] + '\n' + ('<think>\n\n</think>\n\n' if m['role'] == 'assistant' else '')"
        " + m['content']",
    )
    chat = ChatFormat(with_template(chatml, template))
    encoded = chat.encode(talk("Hi", "Yes."))
    response = chatml.decode(encoded.tokens[encoded.prompt_length :])
    assert response == "<think>\n\n</think>\n\nYes.<|im_end|>"
    assert chat.stop_ids == (chatml.eos_token_id,)


def test_a_turn_without_an_end_token_is_kept_as_written(chatml: PreTrainedTokenizerFast) -> None:
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    chat = ChatFormat(with_template(chatml, template))
    encoded = chat.encode(talk("Hi", "Yes."))
    assert chatml.decode(encoded.tokens[encoded.prompt_length :]) == "assistant: Yes.\n"
    assert chat.stop_ids == (chatml.eos_token_id,)


@pytest.mark.parametrize(
    ("template", "head"),
    [
        ("{{ strftime_now('%d %b %Y') }}|", "26 Jul 2024|"),
        ("{{ strftime_now('%d %B %Y') }}|", "26 July 2024|"),
        (
            "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}"
            "{% endif %}{{ date_string }}|",
            "26 Jul 2024|",
        ),
    ],
)
def test_templates_have_one_date(template: str, head: str, chatml: PreTrainedTokenizerFast) -> None:
    chat = ChatFormat(with_template(chatml, template + CHATML))
    text = chatml.decode(chat.encode_prompt(talk("Hi", "")[:1]))
    assert text.startswith(head + "<|im_start|>system\n")
    assert DATE in head or "July" in head
