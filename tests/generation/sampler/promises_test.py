"""The sampler against its own promises: what a text depends on, where it ends, what compiles."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from montessori_jax.config import GenerationConfig, SamplingConfig
from montessori_jax.data.chat import ChatFormat
from montessori_jax.errors import UserError
from montessori_jax.generation.generator import Completion, Generator
from montessori_jax.generation.sampler import JaxSampler
from montessori_jax.models.loaded import LoadedModel
from tests.generation.sampler.asked import TEXT, requests, run, sampler
from tests.models.tiny import CONFIG, write_folder


def test_completions_say_what_they_are(tiny: LoadedModel):
    generator: Generator = sampler(tiny)
    settings = SamplingConfig(max_tokens=40, prompts_per_batch=3)
    batches = list(generator.generate(requests(), settings, samples=4, stop=(), seed=0))
    made = [one for batch in batches for one in batch]
    assert [len(batch) for batch in batches] == [4] * 7
    assert [(one.prompt_id, one.index) for one in made] == [
        (f"p{i}", sample) for i in range(7) for sample in range(4)
    ]
    assert {one.finish for one in made} == {"end", "length"}
    for one in made:
        ended = one.tokens[-1] == 2
        assert one.finish == ("end" if ended else "length")
        assert 2 not in one.tokens[:-1]
        assert ended or len(one.tokens) == 40
        words = one.tokens[:-1] if ended else one.tokens
        assert one.text == generator.chat.decode(words)
        assert "w2" not in one.text.split()


def test_samples_seeds_and_rows_differ_and_repeat(tiny: LoadedModel):
    generator = sampler(tiny)
    settings = replace(TEXT, presence_penalty=0.0)
    made = run(generator, requests(), settings, samples=4)
    assert len({made["p3", sample].tokens for sample in range(4)}) == 4
    assert run(generator, requests(), settings, samples=4) == made
    other = run(generator, requests(), settings, samples=4, seed=1)
    assert all(other[key].tokens != made[key].tokens for key in made)
    renumbered = [replace(one, row=one.row + 1) for one in requests()]
    assert run(generator, renumbered, settings, samples=4)["p3", 0].tokens != made["p3", 0].tokens
    # Fewer samples are the first of more.
    fewer = run(generator, requests(), settings, samples=1)
    assert all(fewer[key] == made[key] for key in fewer)


def test_a_text_does_not_depend_on_what_runs_beside_it(tiny: LoadedModel):
    generator, everything = sampler(tiny), requests()
    made = run(generator, everything, TEXT)
    order = np.random.default_rng(0).permutation(len(everything))
    assert run(generator, [everything[i] for i in order], TEXT) == made
    for one in everything:
        alone = run(generator, [one], TEXT)
        assert all(alone[key] == made[key] for key in alone)
    wider = run(generator, everything, replace(TEXT, prompts_per_batch=5))
    assert wider == made


def test_an_interrupted_run_writes_the_same(tiny: LoadedModel):
    """After however many prompts: the same lists in the same order, as a journal has them."""
    generator, everything = sampler(tiny), requests()
    settings = replace(TEXT, max_tokens=40)

    def listed(finished: set[str]) -> list[list[Completion]]:
        options = {"samples": 2, "stop": (), "seed": 0, "finished": finished}
        return list(generator.generate(everything, settings, **options))

    made = listed(set())
    # Texts of all lengths: prompts end in another order than they are asked.
    longest = [max(len(one.tokens) for one in batch) for batch in made]
    assert longest[:3] != sorted(longest[:3])
    for count in range(1, len(everything) + 1):
        done = {batch[0].prompt_id for batch in made[:count]}
        assert made[:count] + listed(done) == made
    batches = generator.generate(everything, settings, samples=2, stop=(), seed=0)
    assert next(batches) == made[0]
    batches.close()
    # Also prompts from among the others.
    rest = [batch for batch in made if batch[0].prompt_id not in ("p1", "p4")]
    assert listed({"p1", "p4"}) == rest


def test_a_long_text_does_not_hold_the_others_up(tiny: LoadedModel, monkeypatch):
    """With the slots refilled fewer steps write the same texts."""
    looks: list[int] = []
    look = JaxSampler._look

    def counted(self, written, held, *rest):
        before = {slot: one.count for slot, one in held.items()}
        look(self, written, held, *rest)
        looks.append(max(one.count - before[slot] for slot, one in held.items()))

    monkeypatch.setattr(JaxSampler, "_look", counted)
    settings = SamplingConfig(max_tokens=150, prompts_per_batch=3)
    asked = requests([9, 16, 12, 20, 5, 13, 7, 11, 14, 8, 6, 15])
    made = run(sampler(tiny), asked, settings, samples=1)
    refilled = sum(looks)
    looks.clear()
    waiting = JaxSampler(tiny.model, tiny.params, ChatFormat.of(tiny), refill=False)
    assert run(waiting, asked, settings, samples=1) == made
    sizes = [len(made[one.id, 0].tokens) - 1 for one in asked]
    # By hand: whole batches take as long as the longest text in each; refilled slots are busy
    # until none waits, and what is left after that is at most one text in each.
    assert sum(looks) == sum(max(sizes[at : at + 3]) for at in range(0, 12, 3))
    assert sum(sizes) / 3 <= refilled <= sum(sizes) / 3 + max(sizes)
    assert refilled < sum(looks)


def test_stop_strings_end_texts_wherever_they_fall(tiny: LoadedModel):
    generator = sampler(tiny)
    settings = SamplingConfig(max_tokens=40, prompts_per_batch=7)
    made = run(generator, requests(), settings)
    # Across two tokens, in the second chunk of steps: "w7 w3" reads "7 w3" from within a token.
    key, long = next((key, one) for key, one in made.items() if len(one.tokens) >= 25)
    words = long.text.split()
    stop = f"{words[20][1:]} {words[21]}"
    stopped = run(generator, requests(), settings, stop=(stop, "unheard of"))
    for name, one in made.items():
        place = one.text.find(stop)
        if place < 0:
            assert stopped[name] == one
            continue
        assert stopped[name].finish == "stop"
        assert stopped[name].stop == stop
        assert stopped[name].text == one.text[:place]
        used = stopped[name].tokens
        assert used == one.tokens[: len(used)]
        assert stop in generator.chat.decode(used)
        assert stop not in generator.chat.decode(used[:-1])
    assert stopped[key].finish == "stop"


def test_decoding_ends_when_all_texts_have(tiny: LoadedModel):
    """Every word contains "w", so each text stops at its first token and nothing is decoded."""
    generator = sampler(tiny)
    made = run(generator, requests(), SamplingConfig(max_tokens=300, prompts_per_batch=7),
               stop=("w",))  # fmt: skip
    assert {one.finish for one in made.values()} <= {"stop", "end"}
    assert {len(one.tokens) for one in made.values()} == {1}
    assert {entry[0] for entry in generator.programs} == {"vacant", "enter"}


def test_one_token(tiny: LoadedModel):
    settings = replace(TEXT, max_tokens=1)
    long = run(sampler(tiny), requests(), TEXT)
    for key, one in run(sampler(tiny), requests(), settings).items():
        assert one.tokens == long[key].tokens[:1]


def test_programs_are_few_and_shared(tiny: LoadedModel):
    jax.clear_caches()
    generator = sampler(tiny)
    run(generator, requests(), TEXT)
    # Two padded lengths to enter with, one program to write.
    assert sorted(entry[0] for entry in generator.programs) == ["enter", "enter", "vacant", "write"]
    compiled: list[str] = []

    def listen(name: str, _: float, **__: object) -> None:
        if name == "/jax/core/compile/backend_compile_duration":
            compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        again = requests()
        run(generator, again[::-1], TEXT, seed=5, stop=("w7",))
        same = GenerationConfig(
            max_tokens=12,
            prompts_per_batch=3,
            top_p=0.9,
            presence_penalty=0.5,
            prompts=7,
            samples=9,
        )
        run(generator, again, same)
        assert compiled == []
        run(generator, again, replace(TEXT, top_p=0.5))
        assert compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert len(generator.programs) == 8


def test_a_varied_workload_compiles_few_programs(tiny: LoadedModel):
    """Prompts of 5 to 90 tokens, texts of 1 to 300: four lengths to enter, one program to write."""
    rng = np.random.default_rng(0)
    asked = requests(rng.integers(5, 91, 40).tolist())
    generator = sampler(tiny)
    settings = SamplingConfig(max_tokens=300, prompts_per_batch=8)
    made = run(generator, asked, settings, samples=1)
    assert max(len(one.tokens) for one in made.values()) > 150
    kinds = [entry[0] for entry in generator.programs]
    assert kinds.count("vacant") == 1
    assert kinds.count("enter") <= 4
    assert kinds.count("write") == 1
    run(generator, asked[::-1], settings, samples=1, seed=1)
    assert len(generator.programs) == len(kinds)


def test_bfloat16_is_nearly_the_same_text(tiny: LoadedModel):
    settings = SamplingConfig(temperature=0.0, max_tokens=6, prompts_per_batch=7)
    generator = sampler(tiny)
    exact = run(generator, requests(), settings, samples=1)
    narrow = run(generator, requests(), replace(settings, dtype="bfloat16"), samples=1)
    assert {leaf.dtype for leaf in jax.tree.leaves(generator._weights)} == {jnp.dtype(jnp.bfloat16)}
    same = [
        a == b for key in exact for a, b in zip(exact[key].tokens, narrow[key].tokens, strict=False)
    ]
    assert np.mean(same) > 0.5


def test_prompts_that_do_not_fit_are_named(tiny: LoadedModel):
    settings = replace(TEXT, max_tokens=380)
    with pytest.raises(UserError, match=r"prompt p3 has 24 tokens.*380.*400 positions"):
        run(sampler(tiny), requests(), settings)
    assert run(sampler(tiny), requests([20]), settings)
    with pytest.raises(UserError, match="prompt p1 is empty"):
        run(sampler(tiny), requests([4, 0]), TEXT)


@pytest.mark.parametrize("leaf", ["norm", "layers"])
def test_broken_weights_are_reported(tiny: LoadedModel, leaf: str):
    broken = dict(tiny.params)
    broken[leaf] = jax.tree.map(lambda x: x.at[..., 0].set(jnp.nan), tiny.params[leaf])
    generator = JaxSampler(tiny.model, broken, ChatFormat.of(tiny))
    with pytest.raises(UserError, match=r"logits for prompt p0 are not finite"):
        run(generator, requests(), TEXT)


PROCESS = """
import hashlib, sys
from montessori_jax.models.folder import load_folder
from tests.generation.sampler.asked import TEXT, requests, run, sampler
made = run(sampler(load_folder(sys.argv[1], name="tiny")), requests(), TEXT, seed=3)
print(hashlib.sha256(repr(sorted(made.items())).encode()).hexdigest())
"""


def test_processes_write_the_same(tmp_path: Path):
    write_folder(tmp_path, CONFIG)
    digests = {
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PROCESS, str(tmp_path)],
            check=True, capture_output=True, text=True, cwd=Path(__file__).parents[3],
        ).stdout
        for _ in range(2)
    }  # fmt: skip
    assert len(digests) == 1
    assert len(digests.pop().strip()) == 64
