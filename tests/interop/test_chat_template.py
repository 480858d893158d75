"""A chat template goes with an export: transformers renders and encodes a conversation as we do."""

import pytest

from switchmamba.checkpoint import newest_valid
from switchmamba.data.chat import CHAT_TEMPLATE, DEFAULT_TEMPLATE, ChatTemplate, encode_conversations
from switchmamba.interop.conversion import export_checkpoint, import_checkpoint
from switchmamba.models.loading import load, read_chat_template, save_model
from tests.generation.tiny_models import tiny_model, tiny_tokenizer
from tests.interop.native_models import save, tiny

transformers = pytest.importorskip("transformers")

TALK = [
    {"role": "system", "content": "Be calm."},
    {"role": "user", "content": "The sea?"},
    {"role": "assistant", "content": "The sea was calm."},
    {"role": "user", "content": "And the\n\nship?"},
]


def test_transformers_reads_the_template_of_an_export_and_gives_the_same_tokens(tmp_path):
    import torch

    model, tokenizer = tiny_model(dtype=torch.float32), tiny_tokenizer()
    save_model(tmp_path / "checkpoint", model, tokenizer, chat_template=DEFAULT_TEMPLATE)
    export_checkpoint(tmp_path / "checkpoint", "hf", tmp_path / "exported")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    template = ChatTemplate()
    first, whole = template.prompt(TALK[:2]), [*template.segments(TALK[:3]), template.prompt(TALK, read=3)]
    for messages, segments in ((TALK[:2], [first]), (TALK, whole)):
        ((ids, _counted),) = encode_conversations(tokenizer, [segments])
        found = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert list(found) == ids.tolist()
    import_checkpoint(tmp_path / "exported", tmp_path / "again")
    assert read_chat_template(newest_valid(tmp_path / "again")) == DEFAULT_TEMPLATE
    assert (tmp_path / "exported" / CHAT_TEMPLATE).is_file()
    assert load(tmp_path / "again").tokenizer.sha256 == tokenizer.sha256


def test_a_gguf_file_has_the_template(tmp_path):
    gguf = pytest.importorskip("gguf")
    model, tokenizer = load(save(tmp_path / "plain", tiny("jamba-compat-tiny")))
    save_model(tmp_path / "checkpoint", model, tokenizer, chat_template=DEFAULT_TEMPLATE)
    export_checkpoint(tmp_path / "checkpoint", "gguf", tmp_path / "gguf", {"file_type": "f32"})
    reader = gguf.GGUFReader(tmp_path / "gguf" / "model-f32.gguf")
    assert reader.fields["tokenizer.chat_template"].contents() == DEFAULT_TEMPLATE
