"""A teacher that is split over two real processes writes what one process writes."""

import json

from montessori_jax.config import MeshConfig, ResponseConfig, SamplingConfig
from montessori_jax.generation.generator import PromptRequest
from montessori_jax.generation.teacher import JaxTeachers
from tests.cluster_test import run
from tests.tiny_world import write_tiny_teacher

PROMPTS = ["Name three rivers.", "Add 2 and 3.", "Say hello."]
SETTINGS = SamplingConfig(temperature=1.0, max_tokens=8, prompts_per_batch=2, dtype="float32")


def texts_of(folder: str, ways: int) -> list[list[str]]:
    """Two texts a prompt, by a teacher whose weights ``ways`` devices share."""
    teachers = JaxTeachers(SETTINGS, ResponseConfig(), MeshConfig(sampler=ways))
    teacher = teachers.teacher(folder)
    assert teacher.chat is not None
    assert teacher.together == (ways > 1)
    asked = [
        PromptRequest(
            str(n), tuple(teacher.chat.encode_prompt([{"role": "user", "content": text}])), n
        )
        for n, text in enumerate(PROMPTS)
    ]
    made = teacher.generator.generate(asked, SETTINGS, samples=2, seed=3)
    return [[one.text for one in batch] for batch in made]


def test_two_processes_write_each_text_together(tmp_path):
    folder = str(write_tiny_teacher(tmp_path / "teacher"))
    body = (
        "import json; from tests.generation.together_test import texts_of\n"
        f"        print('texts', json.dumps(texts_of({folder!r}, 2)), flush=True)"
    )
    alone = texts_of(folder, 1)
    assert len({text for texts in alone for text in texts}) > 1
    for status, said in run(body):
        assert status == 0, said
        [line] = [one for one in said.splitlines() if one.startswith("texts ")]
        assert json.loads(line.removeprefix("texts ")) == alone
