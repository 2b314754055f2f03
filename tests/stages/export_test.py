"""What a trained model's folder says beside its weights."""

from montessori_jax.data.chat import ChatFormat
from montessori_jax.models.folder import load_folder
from montessori_jax.stages.trained import export
from tests.models.tiny import CONFIG, write_folder


def test_a_model_without_a_chat_template_leaves_with_the_one_it_was_trained_with(tmp_path):
    loaded = load_folder(write_folder(tmp_path / "model", CONFIG), name="tiny")
    assert not loaded.tokenizer.chat_template
    chat = ChatFormat.of(loaded)
    export(tmp_path, "student", loaded.model, loaded.params, loaded, "A card.")
    again = load_folder(tmp_path / "student", name="student")
    assert again.tokenizer.chat_template == chat.template
    asked = [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7"}]
    assert ChatFormat.of(again).encode(asked).tokens.tolist() == chat.encode(asked).tokens.tolist()
