"""What the lm-evaluation-harness is told does not depend on batches, and agrees with `evaluate` and `generate`."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from switchmamba import LanguageModel, cli
from switchmamba.errors import ConfigError
from switchmamba.evaluation.harness import HarnessModel, open_tasks, run_tasks
from switchmamba.evaluation.perplexity import evaluate
from switchmamba.generation.generate import generate
from switchmamba.generation.settings import SamplingSettings
from switchmamba.models.config import ModelConfig
from switchmamba.models.loading import save_model
from tests.generation.tiny_models import TEXTS, tiny_model, tiny_tokenizer

TASKS = Path(__file__).parent / "tasks"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


def instances(kind, arguments):
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def harness(batch_size=8, **options):
    return HarnessModel(tiny_model(), tiny_tokenizer(), batch_size=batch_size, **options)


def test_log_likelihoods_do_not_depend_on_batch_or_order():
    words = [text.split(" ") for text in TEXTS]
    asked = [
        (" ".join(text[:k]), " " * (k > 0) + " ".join(text[k : k + n]))
        for text in words
        for k, n in ((0, 2), (1, 1), (2, 1), (2, 3), (5, 2))
    ]
    alone = harness(1).loglikelihood(instances("loglikelihood", asked), disable_tqdm=True)
    order = torch.randperm(len(asked), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = harness(5).loglikelihood(
        instances("loglikelihood", [asked[i] for i in order]), disable_tqdm=True
    )
    for position, i in enumerate(order):
        assert shuffled[position] == (pytest.approx(alone[i][0], rel=1e-5), alone[i][1])


def test_a_whole_text_is_as_probable_as_evaluate_says(tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text(json.dumps({"text": TEXTS[0]}))
    (log_p,) = harness().loglikelihood_rolling(instances("loglikelihood_rolling", [(TEXTS[0],)]))
    end, ids = tiny_tokenizer().end_of_text_id, tiny_tokenizer().encode(TEXTS[0])
    with torch.inference_mode():  # `evaluate` predicts the end of text too
        log_p_V = tiny_model()(torch.tensor([[end, *ids]])).logits[0, -1].double().log_softmax(-1)
    result = evaluate(tiny_model(), tiny_tokenizer(), file)
    assert -log_p - log_p_V[end].item() == pytest.approx(result.loss * result.tokens, rel=1e-5)


def test_windows_of_a_whole_text_count_every_token_once():
    ids = tiny_tokenizer().encode(TEXTS[0])
    (short,) = harness(context_length=5).loglikelihood_rolling(instances("r", [(TEXTS[0],)]))
    end, expected = tiny_tokenizer().end_of_text_id, 0.0
    model = tiny_model()
    with torch.inference_mode():
        for start in range(0, len(ids), 5):
            targets = ids[start : start + 5]
            # The last window reaches back so that it is full.
            first = max(0, start + len(targets) - 5)
            inputs = [end if first == 0 else ids[first - 1], *ids[first : start + len(targets) - 1]]
            log_p_LV = model(torch.tensor([inputs])).logits[0].double().log_softmax(-1)[-len(targets) :]
            expected += log_p_LV.gather(1, torch.tensor(targets)[:, None]).sum().item()
    assert short == pytest.approx(expected, rel=1e-5)


def test_generation_is_what_generate_writes_up_to_the_stop_text():
    contexts = [text[:20] for text in TEXTS]
    asked = [(context, {"until": ["e"], "max_gen_toks": 6}) for context in contexts]
    texts = harness(2).generate_until(instances("generate_until", asked))
    for context, text in zip(contexts, texts, strict=True):
        alone = generate(
            tiny_model(),
            tiny_tokenizer(),
            [context],
            SamplingSettings(temperature=0),
            max_tokens=6,
            stop=["e"],
        )
        assert text == alone.result.completions[0].text
        assert "e" not in text


def test_a_context_of_spaces_alone_is_the_beginning_of_a_document():
    (found,) = harness().loglikelihood(instances("l", [("  ", "ab")]), disable_tqdm=True)
    (whole,) = harness().loglikelihood_rolling(instances("r", [("  ab",)]))
    assert found[0] == pytest.approx(whole, rel=1e-6)


def test_a_context_is_cut_on_the_left_to_the_longest_input():
    long, short = "x" * 50 + TEXTS[0][:8], TEXTS[0][:8]
    tokens = len(tiny_tokenizer().encode(short)) + len(tiny_tokenizer().encode("ab"))
    model = harness(context_length=tokens - 1)
    first, second = model.loglikelihood(instances("l", [(long, "ab"), (short, "ab")]), disable_tqdm=True)
    assert first[0] == pytest.approx(second[0], rel=1e-6)
    assert harness().loglikelihood(instances("l", [(long, "ab")]), disable_tqdm=True)[0][0] != pytest.approx(
        second[0], rel=1e-6
    )


@pytest.mark.parametrize(
    ("asked", "message"),
    [({"until": [], "num_beams": 4}, "num_beams"), ({"until": [], "max_gen_toks": 100}, "no room")],
)
def test_what_generation_cannot_do_is_refused(asked, message):
    with pytest.raises(ConfigError, match=message):
        harness(context_length=50).generate_until(instances("generate_until", [("a", asked)]))


def test_a_model_that_looks_ahead_is_refused():
    config = tiny_model().config.model_dump()
    config["layers"]["moe"]["router"] = {"kind": "expert_choice"}
    model = LanguageModel(ModelConfig.model_validate(config)).eval()
    with pytest.raises(ConfigError, match="not causal"):
        HarnessModel(model, tiny_tokenizer())


def test_local_tasks_run_offline_and_batches_change_nothing():
    names = ["local_choice", "local_rolling", "local_generation"]
    results = [
        run_tasks(harness(batch_size), names, open_tasks(names, TASKS))["results"] for batch_size in (1, 4)
    ]
    for name in names:
        assert results[0][name].keys() == results[1][name].keys()
        for metric, value in results[0][name].items():
            if isinstance(value, float) and "stderr" not in metric:
                assert results[1][name][metric] == pytest.approx(value, rel=1e-5), (name, metric)
    assert results[0]["local_choice"]["acc,none"] in {n / 5 for n in range(6)}
    assert 1 < results[0]["local_rolling"]["word_perplexity,none"] < math.inf


def test_the_command_prints_a_table_or_json(tmp_path, capsys):
    checkpoint = tmp_path / "checkpoint"
    save_model(checkpoint, tiny_model(dtype=torch.float32), tiny_tokenizer())
    words = ["evaluate", str(checkpoint), "--device", "cpu", "--tasks", str(TASKS), "--limit", "3"]
    assert cli.main([*words, "--harness", "local_*", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert sorted(told["results"]) == ["local_choice", "local_generation", "local_rolling"]
    assert told["n-samples"]["local_choice"] == {"original": 5, "effective": 3}
    assert cli.main([*words, "--harness", "local_choice"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line.split() for line in lines if " acc " in line]
    accuracy, error = (told["results"]["local_choice"][name] for name in ("acc,none", "acc_stderr,none"))
    assert line == ["local_choice", "0", "acc", f"{accuracy:.4f}", "±", f"{error:.4f}"]


def test_a_task_that_cannot_be_run_is_named_with_what_the_harness_says(tmp_path, capsys):
    checkpoint = tmp_path / "checkpoint"
    save_model(checkpoint, tiny_model(dtype=torch.float32), tiny_tokenizer())
    words = ["evaluate", str(checkpoint), "--device", "cpu", "--tasks", str(TASKS)]
    assert cli.main([*words, "--harness", "local_choice", "--num-fewshot", "30"]) == 2
    assert (
        "local_choice cannot be run as it is written: Sample larger than population"
        in capsys.readouterr().err
    )
    tasks = tmp_path / "tasks"
    shutil.copytree(TASKS, tasks)
    task = tasks / "local_choice.yaml"
    task.write_text(task.read_text().replace('"{{question}}"', '"{{nothing.there}}"'))
    assert cli.main([*words[:-1], str(tasks), "--harness", "local_choice"]) == 2
    assert "'nothing' is undefined" in capsys.readouterr().err


def test_a_task_file_that_cannot_be_read_is_named(tmp_path):
    tasks = tmp_path / "tasks"
    shutil.copytree(TASKS, tasks)
    broken, listed = tasks / "broken.yaml", tasks / "listed.yaml"
    listed.write_text("- task: mine\n")
    (tasks / "missing.yaml").write_text("include: nowhere.yaml\ntask: yours\n")
    open_tasks(["local_choice"], tasks)
    for name in ("mine", "yours"):
        with pytest.raises(ConfigError, match=rf"no such task.*none stands in {listed}, .*missing\.yaml \("):
            open_tasks([name], tasks)
    broken.write_text("task: mine\ndoc_to_text: [\n")
    with pytest.raises(ConfigError, match=rf"{broken}, line 3: not valid YAML"):
        open_tasks(["local_choice"], tasks)
    broken.write_bytes(b"task: \xff")
    with pytest.raises(ConfigError, match=rf"{broken}: cannot be read: .*utf-8"):
        open_tasks(["local_choice"], tasks)


@pytest.mark.parametrize("kind", [ValueError, FileNotFoundError])
def test_a_fault_of_the_model_is_not_blamed_on_the_task(kind, monkeypatch):
    def fail(*_, **__):
        raise kind("ours")

    monkeypatch.setattr("switchmamba.evaluation.harness.score_continuations", fail)
    with pytest.raises(kind, match=r"^ours$") as caught:
        run_tasks(harness(), ["local_choice"], open_tasks(["local_choice"], TASKS))
    assert caught.type is kind


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "either --data"),
        (["--harness", "local_choise", "--tasks", str(TASKS)], "local_choice"),
        (["--harness", "x", "--tasks", "nowhere"], "not a directory"),
        (["--harness", "local_choice", "--data", "x"], "either --data"),
        (["--data", "x", "--limit", "3"], "--limit has no meaning"),
        (["--harness", "local_choice", "--repeats"], "--repeats has no meaning"),
        (["--harness", "local_choice", "--max-tokens", "9"], "--max-tokens has no meaning"),
        (["--harness", "local_choice", "--allow-non-causal"], "--allow-non-causal has no meaning"),
    ],
)
def test_what_cannot_be_asked_is_refused(words, message, tmp_path, capsys):
    checkpoint = tmp_path / "checkpoint"
    save_model(checkpoint, tiny_model(dtype=torch.float32), tiny_tokenizer())
    assert cli.main(["evaluate", str(checkpoint), *words]) == 2
    assert message in capsys.readouterr().err


def test_without_the_extra_the_error_says_what_to_install(tmp_path, capsys, monkeypatch):
    checkpoint = tmp_path / "checkpoint"
    save_model(checkpoint, tiny_model(dtype=torch.float32), tiny_tokenizer())
    monkeypatch.setattr("switchmamba.extras.find_spec", lambda package: None)
    assert cli.main(["evaluate", str(checkpoint), "--harness", "x"]) == 2
    assert "pip install 'switchmamba[eval]'" in capsys.readouterr().err
