import pytest

from montessori_jax.cli import run
from montessori_jax.config import RunConfig
from montessori_jax.config_file import build, load_run_config, override, read_config, read_yaml
from montessori_jax.errors import UserError


def refused(kind, values):
    with pytest.raises(UserError) as caught:
        build(kind, values, "my.yaml")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("my.yaml: ")
    return message


def test_unknown_key_is_named_with_those_that_are_known():
    message = refused(RunConfig, {"dpo": {"bta": 0.1}})
    assert "'dpo.bta'" in message
    assert "beta" in message


@pytest.mark.parametrize(
    ("values", "key", "hint"),
    [
        ({"dpo": {"beta": -1}}, "dpo.beta", "greater than 0"),
        ({"sft": {"batch_size": 1.5}}, "sft.batch_size", "integer"),
        ({"sft": {"learning_rate": float("nan")}}, "sft.learning_rate", "finite"),
        ({"generation": {"style": "poem"}}, "generation.style", "'chat', 'turns' or 'list'"),
        ({"generation": {"filters": {"min_words": "x"}}}, "generation.filters.min_words", "int"),
        ({"dpo": 3}, "dpo", "dictionary"),
    ],
)
def test_wrong_values_name_the_key_and_what_was_expected(values, key, hint):
    message = refused(RunConfig, values)
    assert f"'{key}'" in message
    assert hint in message


def test_overrides_reach_into_sections_and_leave_the_source_alone():
    source = {"sft": {"rows": 3}, "seed": 1}
    changed = override(source, ["sft.rows=5", "sft.learning_rate=1e-3", "dpo.beta=0.5"])
    assert changed["sft"] == {"rows": 5, "learning_rate": "1e-3"}
    assert source == {"sft": {"rows": 3}, "seed": 1}
    # YAML reads 1e-3 as text; a float field takes it all the same.
    assert build(RunConfig, changed, "x").sft.learning_rate == 1e-3


def test_overrides_reach_nested_sections_without_touching_the_source():
    source = {"generation": {"filters": {"min_words": 3}}}
    changed = override(source, ["generation.filters.min_words=9"])
    assert changed["generation"]["filters"]["min_words"] == 9
    assert source["generation"]["filters"]["min_words"] == 3


@pytest.mark.parametrize("assignment", ["sft.rows", "=3", "seed.deeper=3", "seed=[1"])
def test_malformed_overrides_are_refused(assignment):
    with pytest.raises(UserError, match="override"):
        override({"seed": 1}, [assignment])


def test_yaml_errors_are_one_line(tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1,\nb: 2")
    with pytest.raises(UserError, match="not valid YAML") as caught:
        read_yaml(broken)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot be read"):
        read_yaml(tmp_path / "absent.yaml")
    broken.write_text("- a\n- b\n")
    with pytest.raises(UserError, match="found list"):
        read_yaml(broken)


def test_a_file_goes_on_top_of_its_base_section_by_section(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "first.yaml").write_text(
        "seed: 1\nsft: {rows: 3, batch_size: 4}\ngeneration: {filters: {keywords: [a, b]}}\n"
    )
    (tmp_path / "deep/second.yaml").write_text(
        "base: ../first.yaml\nsft: {rows: 5}\ngeneration: {filters: {keywords: [c]}}\n"
    )
    (tmp_path / "third.yaml").write_text("base: deep/second.yaml\nseed: 2\n")
    assert read_config(tmp_path / "third.yaml") == {
        "seed": 2,
        "sft": {"rows": 5, "batch_size": 4},
        "generation": {"filters": {"keywords": ["c"]}},
    }
    config = load_run_config(tmp_path / "third.yaml", ["sft.batch_size=2"])
    assert (config.seed, config.sft.rows, config.sft.batch_size) == (2, 5, 2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base: own.yaml", "'base' comes back to this file"),
        ("base: other.yaml", "'base' comes back to this file"),
        ("base: absent.yaml", r"absent.yaml: cannot be read: .* \(the base of .*own.yaml\)"),
        ("base: [a.yaml]", r"'base' is \['a.yaml'\], but: a file's name"),
        ("base: wrong.yaml", "own.yaml: unknown key 'sft.rovs'"),
    ],
)
def test_a_base_that_cannot_be_is_one_line(tmp_path, text, words):
    (tmp_path / "own.yaml").write_text(text)
    (tmp_path / "other.yaml").write_text("base: own.yaml")
    (tmp_path / "wrong.yaml").write_text("sft: {rovs: 3}")
    with pytest.raises(UserError, match=words) as caught:
        load_run_config(tmp_path / "own.yaml")
    assert "\n" not in str(caught.value)


def test_a_printed_config_has_no_base(tmp_path, capsys):
    (tmp_path / "first.yaml").write_text("seed: 7\n")
    (tmp_path / "second.yaml").write_text("base: first.yaml\n")
    assert run(["run", str(tmp_path / "second.yaml"), "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert "seed: 7\n" in printed
    assert "base:" not in printed
