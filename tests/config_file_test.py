import pytest

from montessori_jax.config import RunConfig
from montessori_jax.config_file import build, override, read_yaml
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
