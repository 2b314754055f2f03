"""Chats on disk: read as they were written, and memory that hardly grows with their number."""

import json
import tracemalloc

import numpy as np
import pytest

from montessori_jax.data.chat import ChatError, EncodedChat
from montessori_jax.data.encode import encode_rows, encode_to_disk
from montessori_jax.data.encoded_file import EncodedFile
from montessori_jax.data.rows import read_rows
from montessori_jax.errors import UserError


class Letters:
    """A chat format of a token a letter; it refuses a question mark."""

    def encode(self, conversation):
        asked, said = conversation
        if "?" in asked["content"]:
            raise ChatError("no questions")
        tokens = [ord(letter) for letter in asked["content"] + said["content"]]
        return EncodedChat(np.array(tokens, np.int32), len(asked["content"]))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_what_is_read_was_written(tmp_path):
    file = EncodedFile(tmp_path)
    chats = [EncodedChat(np.arange(n, dtype=np.int32), n // 2) for n in (5, 1, 9)]
    for chat in chats:
        file.append(chat)
    assert len(file) == 3
    assert [chat.tokens.tolist() for chat in file] == [chat.tokens.tolist() for chat in chats]
    assert [chat.prompt_length for chat in file[1:]] == [0, 4]
    assert file[-1].tokens.dtype == np.int32
    assert (file.lengths.tolist(), file.prompt_lengths.tolist()) == ([5, 1, 9], [2, 0, 4])
    with pytest.raises(IndexError):
        file[3]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="encoded candidates cannot be kept there"):
        EncodedFile(tmp_path / "absent")


def test_rows_on_disk_are_those_in_memory(tmp_path):
    rows = [
        {"instruction": "ab", "response": "cd", "id": "7"},
        {"instruction": "what?", "response": "no"},
        {"instruction": "", "response": "x"},
        {"instruction": "e", "response": "f", "prompt_id": 3},
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    kept = encode_rows(read_rows(path), Letters(), max_length=1000)
    found = encode_to_disk(path, Letters(), tmp_path)
    for one, other in zip(found.rows, kept.rows, strict=True):
        assert (one.index, one.id, one.prompt_id) == (other.index, other.id, other.prompt_id)
        assert one.response == ""
    assert [chat.tokens.tolist() for chat in found.chats] == [c.tokens.tolist() for c in kept.chats]
    assert found.reasons == kept.skipped == {1: "no questions", 2: "instruction is empty"}


def test_the_content_is_that_of_texts_and_ids(tmp_path):
    rows = [{"instruction": "ab", "response": "cd"}, {"instruction": "e", "response": "f"}]

    def content(rows):
        return encode_to_disk(write(tmp_path / "rows.jsonl", rows), Letters(), tmp_path).content

    same = content(rows)
    assert content(rows) == same
    assert content([rows[0], {**rows[1], "response": "g"}]) != same
    assert content([rows[0], {**rows[1], "id": "last"}]) != same
    assert content(rows[::-1]) != same


def test_memory_holds_no_texts_and_no_tokens(tmp_path):
    def held(count):
        rows = ({"instruction": f"{i} " * 400, "response": "x" * 2000} for i in range(count))
        path = write(tmp_path / "rows.jsonl", rows)
        tracemalloc.start()
        found = encode_to_disk(path, Letters(), tmp_path)
        size = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert len(found.chats) == count
        return size

    # A row's text is 3 kB or more, its tokens over 12 kB; a name and a place take 0.5.
    assert (held(600) - held(100)) / 500 < 1000
