"""transformers' Trainer on a small run: it learns, resumes exactly, and decays what may be decayed."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from switchmamba.hf.trainer import SwitchMambaTrainer, undecayed_parameter_names
from tests.hf.small import model, tokens

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning:torch.utils.data.dataloader"),
]
STEPS = 12


class Counting(Dataset):
    """Rows that count upwards, each from another number."""

    def __len__(self):
        return 64

    def __getitem__(self, i):
        row = 1 + (i + torch.arange(12)) % 60
        return {"input_ids": row, "labels": row}


def arguments(path, **overrides):
    settings = {
        "max_steps": STEPS, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "logging_steps": 1,
        "save_steps": STEPS // 2, "report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 0,
        "dataloader_pin_memory": False, "lr_scheduler_type": "constant", "weight_decay": 0.1, "save_strategy": "steps",
    }  # fmt: skip
    return TrainingArguments(str(path), **{**settings, **overrides})


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("trainer_class", [Trainer, SwitchMambaTrainer])
def test_the_trainer_learns_and_its_checkpoints_are_models(tmp_path, trainer_class):
    trainer = trainer_class(model("moe-mamba"), arguments(tmp_path), train_dataset=Counting())
    trainer.train()
    measured = losses(trainer)
    assert len(measured) == STEPS and measured[-1] < 0.6 * measured[0]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{STEPS}")
    trained = trainer.model.eval()
    assert torch.equal(saved(tokens()).logits, trained(tokens()).logits)
    with torch.no_grad():
        expected = float(trained(_rows(), labels=_rows()).loss)
    assert trainer.evaluate(Counting())["eval_loss"] == pytest.approx(expected, rel=1e-4)


def test_a_run_resumes_where_it_was(tmp_path):
    whole = Trainer(model("moe-mamba"), arguments(tmp_path / "run"), train_dataset=Counting())
    whole.train()
    resumed = Trainer(model("moe-mamba", seed=7), arguments(tmp_path / "run"), train_dataset=Counting())
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{STEPS // 2}"))
    assert losses(resumed) == losses(whole)
    for (name, ours), theirs in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path):
    def after_one_step(rows, accumulate):
        settings = arguments(
            tmp_path, max_steps=1, per_device_train_batch_size=rows, gradient_accumulation_steps=accumulate,
            save_strategy="no", max_grad_norm=0, optim="sgd",
        )  # fmt: skip
        trainer = Trainer(model("moe-mamba", router_aux_loss_coef=0.0), settings, train_dataset=Counting())
        trainer.train()
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

    assert torch.allclose(after_one_step(8, 1), after_one_step(2, 4), atol=1e-6)


def test_metrics_are_computed_of_the_logits(tmp_path):
    def accuracy(prediction):
        return {
            "accuracy": float(
                (prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]).mean()
            )
        }

    trained = model("moe-mamba")
    trainer = Trainer(trained, arguments(tmp_path), compute_metrics=accuracy)
    with torch.no_grad():
        expected = (trained(_rows()).logits[:, :-1].argmax(-1) == _rows()[:, 1:]).float().mean()
    assert trainer.evaluate(Counting())["eval_accuracy"] == pytest.approx(float(expected))


def test_states_are_not_decayed(tmp_path):
    wrapped = model("hybrid")
    wrapped.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    marked = {"A_log", "D", "bias"}
    exempt = undecayed_parameter_names(loaded)
    assert {name.rpartition(".")[2] for name in exempt} == marked
    for trainer_class, spared in ((Trainer, False), (SwitchMambaTrainer, True)):
        trainer = trainer_class(loaded, arguments(tmp_path), train_dataset=Counting())
        decayed = trainer.get_decay_parameter_names(loaded)
        assert ("model.backbone.layers.0.mamba.A_log" not in decayed) is spared
        assert "model.backbone.layers.0.mamba.in_proj.weight" in decayed


@pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")  # peft's calls
def test_lora_adapters_train_and_merge(tmp_path):
    peft = pytest.importorskip("peft")
    base = model("hybrid")
    before = base(tokens()).logits
    targets = ["in_proj", "x_proj", "out_proj", "q_proj", "v_proj"]
    adapted = peft.get_peft_model(
        base, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets, init_lora_weights=False)
    )
    settings = arguments(tmp_path, max_steps=4, save_strategy="no", gradient_checkpointing=True)
    trainer = Trainer(adapted, settings, train_dataset=Counting())
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    adapted.eval()
    text = adapted.generate(input_ids=tokens(), max_new_tokens=3, do_sample=False, pad_token_id=0)
    with_adapter = adapted(tokens()).logits
    merged = adapted.merge_and_unload()
    assert (with_adapter - before).abs().max() > 1e-2
    assert torch.allclose(merged(tokens()).logits, with_adapter, atol=1e-4)
    assert torch.equal(merged.generate(tokens(), max_new_tokens=3, do_sample=False, pad_token_id=0), text)


def test_a_run_in_16_bits_learns_too(tmp_path):
    trainer = Trainer(model("moe-mamba"), arguments(tmp_path, bf16=True), train_dataset=Counting())
    trainer.train()
    assert losses(trainer)[-1] < 0.6 * losses(trainer)[0]
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


def _rows():
    return torch.stack([Counting()[i]["input_ids"] for i in range(64)])
