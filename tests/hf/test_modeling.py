import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DataCollatorWithFlattening,
)

from switchmamba.errors import ConfigError
from switchmamba.hf import (
    SwitchMambaCache,
    SwitchMambaForCausalLM,
    SwitchMambaForSequenceClassification,
    SwitchMambaModel,
)
from switchmamba.training.losses import mean_load_balance_loss, mean_z_loss
from tests.hf.small import FAMILIES, VOCAB, config, model, native, relative, tokens

families = pytest.mark.parametrize("family", list(FAMILIES))


@families
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_logits_are_the_native_ones_bit_for_bit(family, training, grad):
    wrapped = model(family).train(training)
    with torch.set_grad_enabled(grad):
        ours = wrapped(tokens(3, 20), use_cache=False)
        theirs = native(wrapped)(tokens(3, 20))
    assert torch.equal(ours.logits, theirs.logits)
    assert ours.logits.requires_grad is grad


def test_only_training_drops_tokens_over_capacity():
    wrapped = model("moe-mamba", layers__moe__capacity_factor=0.5)
    kept = wrapped(tokens(3, 20)).logits
    assert torch.equal(kept, native(wrapped)(tokens(3, 20)).logits)
    dropped = wrapped.train()(tokens(3, 20)).logits
    assert torch.equal(dropped, native(wrapped)(tokens(3, 20)).logits)
    assert not torch.equal(kept, dropped)


@families
def test_a_saved_model_comes_back_bit_for_bit(family, tmp_path):
    wrapped = model(family)
    wrapped.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()  # in several shards
    assert not list(tmp_path.glob("*.bin"))
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is SwitchMambaForCausalLM and not loaded.training
    assert not any(report.values())
    assert torch.equal(loaded(tokens()).logits, wrapped(tokens()).logits)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is SwitchMambaModel
    assert torch.equal(base(tokens()).last_hidden_state, wrapped.model(tokens()).last_hidden_state)


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    wrapped = model("moe-mamba", tie_word_embeddings=True)
    assert wrapped.lm_head.weight is wrapped.model.backbone.embedding.weight
    wrapped.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.backbone.embedding.weight
    assert torch.equal(loaded(tokens()).logits, native(wrapped)(tokens()).logits)


@families
def test_16_bits_leave_in_fp32_what_the_native_model_leaves(family, tmp_path):
    wrapped = model(family)
    wrapped.save_pretrained(tmp_path)
    by_native = {
        name: parameter.dtype for name, parameter in native(wrapped).to(torch.bfloat16).named_parameters()
    }
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    made = AutoModelForCausalLM.from_config(wrapped.config, dtype=torch.bfloat16)
    for other in (loaded, made, model(family).to(torch.bfloat16)):
        names = {
            name.removeprefix("model.backbone.").replace("lm_head.", "head."): parameter.dtype
            for name, parameter in other.named_parameters()
        }
        assert names == by_native
    if "attention" not in wrapped.config.layers:
        assert torch.float32 in by_native.values()
    cache = loaded(tokens()).past_key_values
    assert all(t.dtype == torch.float32 for name, t in cache.state.tensors().items() if ".ssm_" in name)
    again = native(wrapped).to(torch.bfloat16)
    assert torch.equal(loaded(tokens()).logits, again(tokens()).logits)


def test_weights_that_are_missing_start_as_the_native_ones_and_the_others_stay(tmp_path):
    from safetensors.torch import load_file, save_file

    wrapped = model("hybrid")
    wrapped.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    missing = ["A_log", "mamba.in_proj.weight", "q_proj.weight", "moe.w1_EFD", "lm_head.weight"]
    save_file({n: t for n, t in tensors.items() if not n.endswith(tuple(missing))}, file, {"format": "pt"})
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert len(report["missing_keys"]) == len(missing)
    for name, parameter in loaded.named_parameters():
        same = torch.equal(parameter, tensors[name])
        assert same is (name not in report["missing_keys"]), name
        assert torch.isfinite(parameter).all()
    states = loaded.get_parameter("model.backbone.layers.0.mamba.A_log")
    assert torch.equal(states[0], torch.arange(1, 17).float().log())


@families
def test_padding_on_either_side_changes_nothing(family):
    wrapped, text = model(family), tokens(1, 7)
    alone = wrapped(text).logits
    for left in (3, 0):
        padded = torch.nn.functional.pad(text, (left, 3 - left), value=5)
        mask = torch.nn.functional.pad(torch.ones_like(text), (left, 3 - left))
        beside = torch.cat([padded, tokens(1, 10, seed=2)])
        mask = torch.cat([mask, torch.ones(1, 10, dtype=torch.int64)])
        out = wrapped(beside, attention_mask=mask, output_router_logits=True)
        assert relative(out.logits[:1, left : left + 7], alone) < 1e-5
    if family == "moe-mamba":  # and the routers do not count it
        stats = wrapped.model(beside, attention_mask=mask).router_stats
        assert int(stats[0].num_tokens) == 17


@families
def test_padding_inside_a_text_is_passed_over(family):
    wrapped, text = model(family), tokens(1, 7)
    alone = wrapped(text, output_hidden_states=True, output_router_logits=True)
    padded = torch.cat([text[:, :3], text[:, :2], text[:, 3:], text[:, :1]], dim=1)
    mask = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1, 1, 0]])
    out = wrapped(padded, attention_mask=mask, output_hidden_states=True, output_router_logits=True)
    kept = mask[0].bool()
    assert relative(out.logits[:, kept], alone.logits) < 1e-5
    for padded_values, values in zip(out.hidden_states, alone.hidden_states, strict=True):
        assert relative(padded_values[:, kept], values) < 1e-5
    for padded_values, values in zip(out.router_logits, alone.router_logits, strict=True):
        assert relative(padded_values[kept], values) < 1e-5
    # Behind text, what the text ended with stands: the last place predicts what comes next.
    assert torch.equal(out.logits[:, 3:5], out.logits[:, [2, 2]])
    assert torch.equal(out.logits[:, -1], out.logits[:, -2])
    following = tokens(1, 1, seed=4)
    goes_on = wrapped(
        following,
        past_key_values=out.past_key_values,
        attention_mask=torch.cat([mask, torch.ones(1, 1, dtype=torch.int64)], dim=1),
    )
    together = wrapped(torch.cat([text, following], dim=1))
    assert relative(goes_on.logits, together.logits[:, -1:]) < 1e-5


def test_packed_documents_are_as_if_read_alone():
    wrapped = model("hybrid")
    first, second = tokens(1, 5), tokens(1, 6, seed=2)
    alone = torch.cat([wrapped(first).logits, wrapped(second).logits], dim=1)
    both = torch.cat([first, second], dim=1)
    positions = torch.cat([torch.arange(5), torch.arange(6)])[None]
    by_id = torch.tensor([[0] * 5 + [1] * 6])
    assert relative(wrapped(both, position_ids=positions).logits, alone) < 1e-5
    assert relative(wrapped(both, document_ids=by_id).logits, alone) < 1e-5
    assert relative(wrapped(both).logits, alone) > 1e-2
    flattened = DataCollatorWithFlattening()([{"input_ids": row[0].tolist()} for row in (first, second)])
    loss = (4 * wrapped(first, labels=first).loss + 5 * wrapped(second, labels=second).loss) / 9
    assert torch.allclose(wrapped(**flattened).loss, loss, atol=1e-6)
    with pytest.raises(ConfigError, match=r"document_ids must be of tokens' shape \(1, 11\)"):
        wrapped(both, document_ids=by_id[:, :3])
    with pytest.raises(ConfigError, match="document_ids must not decrease"):
        wrapped(both, document_ids=by_id.flip(1))
    with pytest.raises(ConfigError, match="attention_mask and document_ids"):
        wrapped(both, document_ids=by_id, attention_mask=torch.ones_like(both))


def test_embeddings_in_place_of_tokens_give_the_same():
    wrapped = model()
    embedded = wrapped.get_input_embeddings()(tokens())
    assert torch.equal(wrapped(inputs_embeds=embedded).logits, wrapped(tokens()).logits)
    with pytest.raises(ConfigError, match="exactly one of input_ids and inputs_embeds"):
        wrapped(tokens(), inputs_embeds=embedded)


def test_hidden_states_are_the_residual_stream_and_change_no_bit():
    wrapped = model("hybrid")
    out = wrapped(tokens(), output_hidden_states=True)
    assert torch.equal(out.logits, wrapped(tokens()).logits)
    assert len(out.hidden_states) == wrapped.config.num_hidden_layers + 1
    assert torch.equal(out.hidden_states[0], wrapped.get_input_embeddings()(tokens()))
    assert torch.equal(wrapped.lm_head(out.hidden_states[-1]), out.logits)


def test_router_logits_are_what_the_routers_chose_by():
    wrapped = model("moe-mamba")
    out = wrapped.model(tokens(), output_router_logits=True)
    (logits_TE,) = out.router_logits
    assert logits_TE.shape == (18, 4)
    chosen = torch.bincount(logits_TE.argmax(-1), minlength=4)
    assert torch.equal(chosen, out.router_stats[0].tokens_per_expert_E)
    assert wrapped(tokens()).router_logits is None


def test_the_loss_is_cross_entropy_and_in_training_the_native_routing_losses():
    wrapped = model("moe-mamba", router_aux_loss_coef=0.5, router_z_coef=0.25)
    labels = tokens().clone()
    labels[:, :3] = -100
    out = wrapped(tokens(), labels=labels)
    expected = torch.nn.functional.cross_entropy(out.logits[:, 2:-1].flatten(0, 1), labels[:, 3:].flatten())
    assert torch.allclose(out.loss, expected)
    stats = native(wrapped)(tokens()).router_stats
    assert torch.equal(out.aux_loss, mean_load_balance_loss(stats))
    routing = 0.5 * mean_load_balance_loss(stats) + 0.25 * mean_z_loss(stats)
    assert torch.allclose(wrapped.train()(tokens(), labels=labels).loss, expected + routing)
    assert torch.allclose(
        wrapped.eval()(tokens(), labels=labels, output_router_logits=True).loss, expected + routing
    )


def test_pieces_of_a_batch_add_up_to_its_loss():
    wrapped = model("moe-mamba", router_aux_loss_coef=0.5).train()
    rows = tokens(4, 9)
    parts = [wrapped(piece, labels=piece, num_items_in_batch=torch.tensor(32)) for piece in rows.chunk(2)]
    cross_entropy = wrapped.eval()(rows, labels=rows).loss
    aux = torch.stack([part.aux_loss for part in parts]).mean()
    assert torch.allclose(sum(part.loss for part in parts), cross_entropy + 0.5 * aux)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_checkpointed_activations_change_no_gradient(reentrant):
    def gradients(checkpointed):
        wrapped = model("hybrid").train()
        if checkpointed:
            kwargs = None if reentrant is None else {"use_reentrant": reentrant}
            name = "activation_checkpointing_enable"  # transformers' new name
            getattr(wrapped, name if hasattr(wrapped, name) else "gradient_checkpointing_enable")(kwargs)
        out = wrapped(tokens(), labels=tokens(), output_router_logits=True)
        out.loss.backward()
        return {name: parameter.grad for name, parameter in wrapped.named_parameters()}

    plain, checkpointed = gradients(False), gradients(True)
    for name, gradient in plain.items():
        assert torch.equal(gradient, checkpointed[name]), name


def test_logits_of_some_positions_are_those_of_all():
    wrapped = model()
    every = wrapped(tokens()).logits
    for kept, expected in (
        (2, every[:, -2:]),
        (torch.tensor([0, 5]), every[:, [0, 5]]),
        (torch.tensor([[0, 5], [3, 3]]), torch.stack([every[0, [0, 5]], every[1, [3, 3]]])),
        (tokens() > 30, every[tokens() > 30]),
    ):
        assert torch.allclose(wrapped(tokens(), logits_to_keep=kept).logits, expected, atol=1e-6)


def test_more_tokens_can_be_added():
    wrapped = model("moe-mamba")
    before = wrapped(tokens()).logits
    wrapped.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
    assert wrapped.config.vocab_size == wrapped.config.native.vocab_size == VOCAB + 3
    after = wrapped(tokens())
    assert torch.equal(after.logits[..., :VOCAB], before)
    assert wrapped(torch.tensor([[VOCAB + 2]])).logits.shape == (1, 1, VOCAB + 3)
    with pytest.raises(ConfigError, match=rf"token id {VOCAB + 3} is outside \[0, {VOCAB + 3}\)"):
        wrapped(torch.tensor([[VOCAB + 3]]))


def test_a_foreign_cache_is_refused():
    from transformers import DynamicCache

    with pytest.raises(ConfigError, match="past_key_values is a DynamicCache, which cannot hold a recurrent"):
        model()(tokens(), past_key_values=DynamicCache())


def test_a_classifier_looks_at_the_last_token_of_each_row():
    torch.manual_seed(0)
    classifier = SwitchMambaForSequenceClassification(
        config("moe-mamba", num_labels=3, pad_token_id=0)
    ).eval()
    text = tokens(1, 6)
    alone = classifier(text).logits
    hidden = classifier.model(text).last_hidden_state
    assert torch.equal(alone, classifier.score(hidden[:, -1]))
    right, left = (torch.nn.functional.pad(text, p) for p in ((0, 2), (2, 0)))
    for padded in (right, left):
        assert relative(classifier(padded).logits, alone) < 1e-5
        mask = (padded != 0).long()
        assert relative(classifier(padded, attention_mask=mask).logits, alone) < 1e-5
    out = classifier.train()(right, labels=torch.tensor([2]))
    out.loss.backward()
    assert all(p.grad is not None for name, p in classifier.named_parameters() if "moe.w" not in name)
    classifier.config.pad_token_id = None
    rows, positions = text.expand(2, -1), torch.arange(text.shape[1]).expand(2, -1)
    assert relative(classifier.eval()(rows, position_ids=positions).logits, alone.expand(2, -1)) < 1e-5
    with pytest.raises(ConfigError, match="where the sequences end is unknown"):
        classifier(tokens(2, 5))


@pytest.mark.parametrize(
    "made",
    [SwitchMambaModel, SwitchMambaForCausalLM, SwitchMambaForSequenceClassification],
)
def test_an_unknown_keyword_is_refused_and_what_every_model_is_handed_is_not(made):
    wrapped = made(config("mamba")).eval()
    text = tokens(1, 5)
    for misspelt, meant in (("document_id", "document_ids"), ("position_id", "position_ids")):
        with pytest.raises(ConfigError, match=f"takes no keyword {misspelt}; did you mean {meant}"):
            wrapped(text, **{misspelt: torch.zeros_like(text)})
    handed = {"token_type_ids": torch.zeros_like(text), "output_attentions": False, "num_items_in_batch": 5}
    handed |= {"ignore_index": -100, "cache_position": torch.arange(5)}
    assert torch.equal(wrapped(text, **handed, return_dict=True)[0], wrapped(text, nothing=None)[0])


def test_keywords_of_a_collator_of_packed_texts_are_taken():
    rows = [{"input_ids": row.tolist()} for row in tokens(2, 5)]
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    wrapped, flattened = model("mamba"), collator(rows)
    assert {"seq_idx", "cu_seq_lens_q"} <= flattened.keys()
    assert torch.equal(wrapped(**flattened).loss, wrapped(**DataCollatorWithFlattening()(rows)).loss)


@pytest.mark.parametrize("mark", ["seq_idx", "cu_seq_lens_q"])
def test_marks_of_packing_that_are_not_read_are_refused_alone(mark):
    wrapped, text = model("mamba"), tokens(1, 5)
    ids = torch.tensor([[0, 0, 1, 1, 1]])
    with pytest.raises(ConfigError, match=f"{mark} alone does not keep packed documents apart"):
        wrapped(text, **{mark: ids})
    told = wrapped(text, document_ids=ids).logits
    assert torch.equal(wrapped(text, document_ids=ids, **{mark: ids}).logits, told)
    assert not torch.equal(wrapped(text).logits, told)


def test_a_classifier_of_packed_documents_reads_the_last_one_alone():
    torch.manual_seed(0)
    classifier = SwitchMambaForSequenceClassification(config("hybrid", num_labels=3)).eval()
    text = tokens(2, 9)
    alone = classifier(text[:, 5:], torch.ones(2, 4)).logits
    by_id = torch.tensor([[-1, 0, 0, 1, 1, 2, 2, 2, 2]] * 2)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])
    for pad in (None, 0):  # with a pad token, where texts end is looked for there, and documents stay apart
        classifier.config.pad_token_id = pad
        assert relative(classifier(text, document_ids=by_id).logits, alone) < 1e-5
        for row in (0, 1):
            packed = classifier(text[row : row + 1], position_ids=positions).logits
            assert relative(packed, alone[row : row + 1]) < 1e-5
    assert relative(classifier(text).logits, alone) > 1e-2


def test_a_classifier_is_made_of_a_language_model_and_comes_back(tmp_path):
    wrapped = model("moe-mamba")
    wrapped.save_pretrained(tmp_path / "language-model")
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "language-model", num_labels=4)
    assert torch.equal(
        classifier.model(tokens()).last_hidden_state, wrapped.model(tokens()).last_hidden_state
    )
    classifier.save_pretrained(tmp_path / "classifier")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
    mask = torch.ones_like(tokens())
    assert torch.equal(loaded(tokens(), mask).logits, classifier(tokens(), mask).logits)


def test_the_same_cache_goes_by_both_names():
    wrapped = model("moe-mamba")
    cache = SwitchMambaCache()
    wrapped(tokens()[:, :4], cache_params=cache)
    out = wrapped(tokens()[:, 4:], past_key_values=cache)
    assert out.cache_params is out.past_key_values is cache
    assert relative(out.logits, wrapped(tokens()).logits[:, 4:]) < 1e-5


def test_the_core_does_not_know_transformers():
    code = "import sys, switchmamba.models.loading; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_stored_configuration_names_the_class_and_no_code(tmp_path):
    model().save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["architectures"] == ["SwitchMambaForCausalLM"] and stored["model_type"] == "switchmamba"
    assert "auto_map" not in stored
