"""Adapter folders: peft reads ours, we read peft's, bit for bit; faults are one line."""

import json

import jax
import numpy as np
import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file

from montessori_jax.errors import UserError
from montessori_jax.models import Model
from montessori_jax.models.adapter_folder import CONFIG as CONFIG_FILE
from montessori_jax.models.adapter_folder import WEIGHTS, load_adapter, save_adapter
from montessori_jax.models.families import family_of
from montessori_jax.models.lora import LoraModel, LoraSpec, init_adapter
from montessori_jax.models.sources import load_model, model_fingerprint
from montessori_jax.models.weights import to_params
from tests.models import tiny
from tests.models.peft_twin import CONFIG, logits, twins

TOKENS = tiny.tokens_for(CONFIG, rows=2, length=12).astype(np.int32)

SPEC = LoraSpec(2, 4.0)


def same(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)
    return jax.tree.structure(first) == jax.tree.structure(second)


@pytest.mark.parametrize(
    ("targets", "options"),
    [(("all-linear",), {"rslora": True}), (("v_proj", "self_attn.q_proj"), {"alpha": 2.5})],
)
def test_peft_loads_what_is_exported(tmp_path, targets, options):
    ours, adapter, _ = twins(targets, **options)
    save_adapter(tmp_path, ours.decoder, adapter, ours.spec, base="hf:org/base")
    theirs = PeftModel.from_pretrained(tiny.torch_model(CONFIG), str(tmp_path)).eval()
    assert theirs.peft_config["default"].base_model_name_or_path == "org/base"
    expected = tiny.torch_logits(theirs, TOKENS)
    assert tiny.relative_error(logits(ours, adapter, TOKENS), expected) < 1e-5

    spec, again = load_adapter(tmp_path, ours.decoder)
    assert same(again, adapter)
    assert (spec.rank, spec.alpha, spec.rslora) == (
        ours.spec.rank,
        ours.spec.alpha,
        ours.spec.rslora,
    )
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    save_adapter(tmp_path, ours.decoder, again, spec, base="hf:org/base")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_what_peft_saves_is_imported_bit_for_bit(tmp_path):
    ours, adapter, theirs = twins(("up_proj", "o_proj"), rank=5, alpha=7)
    theirs.save_pretrained(tmp_path)
    spec, found = load_adapter(tmp_path, ours.decoder)
    assert spec == LoraSpec(5, 7.0, ("o_proj", "up_proj"))
    assert same(found, adapter)


def test_names_that_would_say_too_much_are_longer(tmp_path):
    """vLLM and peft match last parts: our names must match these modules and no others."""
    ours, adapter, _ = twins(("q_proj", "down_proj"))
    save_adapter(tmp_path, ours.decoder, adapter, ours.spec)
    settings = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert settings["target_modules"] == ["down_proj", "q_proj"]
    names = load_file(tmp_path / WEIGHTS)
    assert "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight" in names
    assert len(names) == 2 * 2 * CONFIG["num_hidden_layers"]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_names_and_shapes_are_pefts_in_every_family(tmp_path, family):
    settings = tiny.FAMILIES[family]
    model = Model(family_of(settings, "test"))
    save_adapter(tmp_path, model, init_adapter(jax.random.key(0), model, SPEC), SPEC)
    theirs = get_peft_model(
        tiny.torch_model(settings), LoraConfig(r=2, target_modules="all-linear")
    )
    expected = {
        name.replace(".default", ""): tuple(parameter.shape)
        for name, parameter in theirs.named_parameters()
        if ".lora_" in name
    }
    found = {name: tensor.shape for name, tensor in load_file(tmp_path / WEIGHTS).items()}
    assert found == expected


def test_another_familys_logits(tmp_path):
    """Gemma 2: norms around each part, soft caps, a tied and scaled embedding."""
    settings = tiny.FAMILIES["gemma2"]
    torch_model = tiny.torch_model(settings)
    config = family_of(settings, "test")
    ours = LoraModel(config, to_params(config, tiny.state(torch_model)), SPEC)
    adapter = jax.tree.map(lambda leaf: leaf + 0.05, ours.init(jax.random.key(0)))
    save_adapter(tmp_path, ours.decoder, adapter, SPEC)
    plain = tiny.torch_logits(torch_model, TOKENS)
    expected = tiny.torch_logits(
        PeftModel.from_pretrained(torch_model, str(tmp_path)).eval(), TOKENS
    )
    assert tiny.relative_error(plain, expected) > 1e-2
    assert tiny.relative_error(tiny.jax_logits(ours, adapter, TOKENS), expected) < 1e-4


def test_a_model_named_by_its_adapter_is_merged(tmp_path):
    base = tiny.write_folder(tmp_path / "base", CONFIG)
    ours, adapter, theirs = twins()
    folder = tmp_path / "adapter"
    save_adapter(folder, ours.decoder, adapter, ours.spec, base=str(base))
    loaded = load_model(str(folder))
    expected = tiny.torch_logits(theirs, TOKENS)
    found = logits(loaded.model, loaded.params, TOKENS)
    assert tiny.relative_error(found, expected) < 1e-5
    assert loaded.fingerprint == model_fingerprint(str(folder)) != model_fingerprint(str(base))
    change(folder, base_model_name_or_path=None)
    with pytest.raises(UserError, match="names no base model"):
        load_model(str(folder))


def change(folder, **values):
    file = folder / CONFIG_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "IA3"}, "'peft_type' is not LORA"),
        ({"use_dora": True}, "'use_dora' is True"),
        ({"bias": "all"}, "'bias' is 'all'"),
        ({"modules_to_save": ["lm_head"]}, "'modules_to_save'"),
        ({"rank_pattern": {"q_proj": 8}}, "'rank_pattern'"),
        ({"r": 0}, "'r' is 0"),
        ({"r": 2}, "want .2, 24."),
        ({"lora_alpha": "x"}, "'lora_alpha' is 'x'"),
    ],
)
def test_settings_that_are_not_plain_lora_are_refused(tmp_path, values, message):
    ours, adapter, _ = twins()
    save_adapter(tmp_path, ours.decoder, adapter, ours.spec)
    change(tmp_path, **values)
    with pytest.raises(UserError, match=message) as caught:
        load_adapter(tmp_path, ours.decoder)
    assert "\n" not in str(caught.value)


def test_tensors_that_do_not_belong_are_refused(tmp_path):
    ours, adapter, _ = twins(("q_proj",))
    save_adapter(tmp_path, ours.decoder, adapter, ours.spec)
    tensors = load_file(tmp_path / WEIGHTS)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"

    def broken(tensors, message):
        save_file(tensors, tmp_path / WEIGHTS)
        with pytest.raises(UserError, match=message):
            load_adapter(tmp_path, ours.decoder)

    broken({key: x for key, x in tensors.items() if key != name}, "layers.1.* is missing")
    broken({**tensors, "base_model.model.other.weight": tensors[name]}, "unknown tensors: base_")
    broken({"x": tensors[name]}, "adapts no linear layer of this llama model; .* x$")
    (tmp_path / WEIGHTS).write_bytes(b"no")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        load_adapter(tmp_path, ours.decoder)
    (tmp_path / CONFIG_FILE).unlink()
    with pytest.raises(UserError, match="is this an adapter's folder"):
        load_adapter(tmp_path, ours.decoder)
