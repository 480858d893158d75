import dataclasses

import pytest

pytest.importorskip("transformers")

from transformers import AutoConfig

from switchmamba import LanguageModel, presets
from switchmamba.errors import ConfigError
from switchmamba.hf import SwitchMambaConfig
from switchmamba.models.config import ModelConfig


@pytest.mark.parametrize("name", list(presets))
def test_a_preset_is_the_same_model_in_both_forms(name):
    config = SwitchMambaConfig.from_preset(name, vocab_size=99)
    if name.endswith("-tiny"):
        assert config.native == LanguageModel.from_preset(name, vocab_size=99).config
    assert config.num_hidden_layers == len(config.native.steps) == len(config.layer_types)
    assert config.router_aux_loss_coef == presets[name]["training"].get("load_balance_coef", 0.01)


def test_every_key_of_the_native_table_has_a_field():
    names = {SwitchMambaConfig.attribute_map.get(name, name) for name in ModelConfig.model_fields}
    assert names <= {field.name for field in dataclasses.fields(SwitchMambaConfig)}


def test_a_saved_configuration_comes_back(tmp_path):
    config = SwitchMambaConfig.from_preset(
        "moe-mamba-tiny",
        layers__moe__num_experts=8,
        layers__mamba__expand="4/3",
        num_labels=3,
        eos_token_id=0,
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is SwitchMambaConfig
    assert loaded.native == config.native and loaded.num_labels == 3 and loaded.eos_token_id == 0
    assert loaded.layers["moe"]["num_experts"] == 8 and loaded.layers["mamba"]["expand"] == "4/3"


def test_names_of_both_worlds_are_one_value():
    config = SwitchMambaConfig.from_preset("moe-mamba-tiny", hidden_size=48)
    assert config.hidden_size == config.d_model == config.native.d_model == 48
    config.d_model = 64
    assert config.hidden_size == 64
    config.tie_word_embeddings = True
    assert config.native.tie_embeddings
    config.num_hidden_layers = 8
    assert config.num_blocks == 4
    assert config.layer_types == ["linear_attention", "moe"] * 4


def test_attention_is_told_to_those_who_ask():
    assert SwitchMambaConfig.from_preset("transformer-tiny").num_attention_heads == 4
    assert SwitchMambaConfig.from_preset("transformer-tiny").layer_types[0] == "full_attention"
    assert not hasattr(SwitchMambaConfig.from_preset("mamba-tiny"), "num_attention_heads")


def test_what_is_no_model_is_refused():
    with pytest.raises(ConfigError, match=r"layers\.moe\.num_expert.*num_experts"):
        SwitchMambaConfig.from_preset("moe-mamba-tiny", layers__moe__num_expert=3)
    with pytest.raises(ConfigError, match="unknown key vocab_sise; did you mean vocab_size"):
        SwitchMambaConfig.from_preset("moe-mamba-tiny", vocab_sise=3)
    with pytest.raises(ConfigError, match="no preset 'moe-mamba-tyni'"):
        SwitchMambaConfig.from_preset("moe-mamba-tyni")
    with pytest.raises(ConfigError, match=r"num_hidden_layers=3 is not a multiple of the pattern's 2 steps"):
        SwitchMambaConfig.from_preset("moe-mamba-tiny", num_hidden_layers=3)
    with pytest.raises(ConfigError, match=r"native checkpoint.*switchmamba export CKPT --to hf"):
        SwitchMambaConfig.from_dict({"model": presets["mamba-tiny"]["model"], "training": {}})
    with pytest.raises(ConfigError, match="layers is missing"):
        SwitchMambaConfig(pattern=["mamba"])
