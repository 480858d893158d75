"""The report says what the metrics say, in HTML and in Markdown."""

import html
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from switchmamba.evaluation.perplexity import Evaluation
from switchmamba.experiments.document import Document, Literals, Table, Text
from switchmamba.experiments.plots import _centred_loss, loss_curves, loss_gap, validation_curves
from switchmamba.experiments.report import Report, Sample
from switchmamba.experiments.report_accuracy import read_how
from switchmamba.experiments.results import Results, read_results
from switchmamba.experiments.spec import Run
from tests.experiments.synthetic import comparison, power_law, write_analyses, write_experiment

STEPS = 300
EXPECTED_MAMBA = [2.5 + 20 / np.sqrt(STEPS + 8) + 0.004 * seed for seed in range(3)]
EXPECTED_MOE = [2.5 + 20 / np.sqrt(1.5 * STEPS + 8) + 0.004 * seed for seed in range(3)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    directory = tmp_path_factory.mktemp("experiment")
    published = {"source": "a paper", "scale": "25M", "loss": {"mamba": 3.34}, "speedup": {"moe-mamba": 1.76}}
    write_experiment(
        directory, comparison(published=published, note="Mind the gap."), steps=STEPS, noise=0.05
    )
    write_analyses(directory, STEPS)
    return read_results(directory)


@pytest.fixture(scope="module")
def page(results: Results) -> str:
    return Report(results).document().html()


def rows(page: str, heading: str) -> list[list[str]]:
    """Cells of the first table whose head contains ``heading``."""
    table = next(t for t in re.findall(r"<table.*?</table>", page, re.S) if heading in t)
    return [
        [html.unescape(re.sub(r"<[^>]+>", "", cell)) for cell in re.findall(r"<td>(.*?)</td>", row, re.S)]
        for row in re.findall(r"<tr>(.*?)</tr>", table, re.S)[1:]
    ]


def test_the_table_of_outcomes_is_what_the_metrics_say(page: str) -> None:
    mamba, moe = rows(page, "Held-out loss")
    assert mamba[:3] == ["Mamba", "933k", "933k"]
    assert moe[:3] == ["MoE-Mamba", "4.14M", "930k"]
    assert mamba[3] == f"{np.mean(EXPECTED_MAMBA):.3f} ± 0.004"
    assert moe[4] == f"{np.mean(EXPECTED_MOE) + 0.1:.3f} ± 0.004"
    assert mamba[5] == "1"
    assert moe[5] == "1.50 ± 0.00"


def test_the_evaluation_of_all_seeds_is_averaged(page: str) -> None:
    table = rows(page, "Bits per byte")
    assert table[0] == ["Mamba", "3.100 ± 0.100", "22.27 ± 2.22", "1.550 ± 0.050", "0.400 ± 0.000"]


def test_verdict_scale_and_published_numbers_are_on_the_page(results: Results, page: str) -> None:
    assert results.verdicts()[0].sentence in html.unescape(page)
    assert "It came out, at this scale." in page
    assert "Mind the gap." in page
    assert "930k–933k active parameters" in page
    assert rows(page, "Published") == [["Mamba", "3.34", "–"], ["MoE-Mamba", "–", "1.76"]]


def test_every_point_of_the_search_is_listed_and_the_choice_is_bold(page: str) -> None:
    assert len(rows(page, "learning rate")) == 6
    assert f"<strong>{EXPECTED_MOE[0] + 0.1:.3f}</strong>" in page


def test_a_choice_at_the_edge_of_the_grid_is_said(page: str, tmp_path: Path) -> None:
    assert "edge of the grid" not in page  # both choose the middle one of three
    write_experiment(
        tmp_path, comparison(sweep={"training.learning_rate": [1e-3, 2e-3]}, seeds=[0]), steps=STEPS
    )
    told = "For Mamba and MoE-Mamba the best lies at the edge of the grid: a wider one might end lower."
    assert told in Report(read_results(tmp_path)).document().html()


def test_what_routers_drop_and_how_even_they_are_stands_beside_each_other(
    results: Results, page: str
) -> None:
    (cells,) = rows(page, "Dropped")
    metrics = results.arm("moe-mamba").runs[0].metrics
    last_E = [load[-STEPS // 20 :].mean(0) * load.shape[1] for load in metrics.load_WE]
    assert cells[:3] == ["MoE-Mamba", f"{len(last_E)} × {last_E[0].size}", "15.3 ± 0.0%"]
    assert metrics.fullest_load == pytest.approx(max(load.max() for load in last_E))
    assert metrics.emptiest_load == pytest.approx(min(load.min() for load in last_E))
    assert cells[3].startswith(
        f"{np.mean([r.metrics.fullest_load for r in results.arm('moe-mamba').runs]):.2f} ± "
    )


def test_what_routers_drop_is_told_of_the_seeds_that_noted_it(tmp_path: Path) -> None:
    write_experiment(tmp_path, comparison(), steps=STEPS)
    first = read_results(tmp_path).arm("moe-mamba").runs[0].directory / "metrics.jsonl"
    first.write_text(re.sub(r'"dropped": [\d.e-]+, ', "", first.read_text()))  # as in older archives
    page = Report(read_results(tmp_path)).document().html()
    assert rows(page, "Dropped")[0][2] == "15.3 ± 0.0%"
    assert "mean over the routers, of the runs that noted it." in page
    assert "Share of assignments dropped, mean over the routers; the band spans the seeds." in page


def test_what_routers_drop_is_drawn_although_the_first_steps_did_not_note_it(tmp_path: Path) -> None:
    write_experiment(tmp_path, comparison(seeds=[0]), steps=STEPS)
    path = read_results(tmp_path).arm("moe-mamba").runs[0].directory / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    older = [re.sub(r'"dropped": [\d.e-]+, ', "", line) for line in lines[:10]]
    path.write_text("".join(older + lines[10:]))
    results = read_results(tmp_path)
    assert np.isnan(results.arm("moe-mamba").runs[0].metrics.dropped_W).any()
    assert "Share of assignments dropped" in Report(results).document().html()


def test_tokens_of_experts_are_shown_as_they_are(results: Results, page: str) -> None:
    table = rows(page, "over-represented")
    assert len(table) == 32
    assert table[2] == ["1 · 3", "12.5%", "`a|b` <td>⏎ ··return"]
    markdown, _ = Report(results).document().markdown("images")
    assert "| 1 · 3 | 12.5% | `` `a\\|b` `` `<td>⏎` `··return` |" in markdown


def test_the_summary_holds_the_same_numbers(results: Results, tmp_path: Path) -> None:
    Report(results).write(tmp_path / "report.html")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["verdicts"][0]["outcome"] == "holds"
    assert summary["arms"]["moe-mamba"]["training_loss"] == pytest.approx(EXPECTED_MOE)
    assert summary["arms"]["moe-mamba"]["speedup"] == pytest.approx([1.5] * 3, rel=5e-3)
    assert summary["arms"]["mamba"]["evaluation"][2]["loss"] == pytest.approx(3.2)


def test_every_table_scrolls_by_itself_on_a_narrow_screen(page: str) -> None:
    assert page.count("<table") == page.count('<div class="wide" tabindex="0"><table')
    assert ".wide { overflow-x: auto;" in page


def test_the_page_needs_nothing_from_elsewhere(page: str) -> None:
    assert "<script" not in page
    links = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert all(link.startswith(("#", "data:")) for link in links)
    identifiers = re.findall(r' id="([^"]*)"', page)
    assert len(identifiers) == len(set(identifiers))
    assert {link for link in links if link.startswith("#")} <= {f"#{name}" for name in identifiers}


def test_markdown_names_the_plots_that_it_comes_with(results: Results, tmp_path: Path) -> None:
    Report(results).document().write_markdown(tmp_path / "docs" / "result.md")
    text = (tmp_path / "docs" / "result.md").read_text()
    named = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    assert len(named) == 10
    for name in named:
        assert (tmp_path / "docs" / name).read_bytes().startswith(b"\x89PNG")
    assert "switchmamba train moe-mamba-demo --data data" in text


def test_runs_that_are_missing_are_named_and_left_out(tmp_path: Path) -> None:
    write_experiment(tmp_path, comparison(), steps=60)
    (tmp_path / "runs/moe-mamba/learning_rate=0.001/seed=2/metrics.jsonl").unlink()
    page = Report(read_results(tmp_path)).document().html()
    assert "Not finished:" in page
    assert "<code>moe-mamba/learning_rate=0.001/seed=2</code>" in page
    assert "2 of 2 seeds below" in page


def test_a_report_without_any_finished_run_says_what_is_missing(tmp_path: Path) -> None:
    write_experiment(tmp_path, comparison(), steps=60)
    for path in tmp_path.rglob("metrics.jsonl"):
        path.unlink()
    page = Report(read_results(tmp_path)).document().html()
    assert "open, because runs are missing" in page
    assert page.count("seed=0") == 6


def test_a_run_that_blew_up_and_came_back_is_named_and_flattens_no_curve(tmp_path: Path) -> None:
    def blown(steps: np.ndarray, run: Run) -> np.ndarray:
        calm = power_law(steps, run)
        return np.where((run.arm == "mamba") & (steps > 80) & (steps < 120), 5e4, calm)

    write_experiment(tmp_path, comparison(sweep={}, seeds=[0]), blown, steps=STEPS)
    results = read_results(tmp_path)
    page = Report(results).document().html()
    assert "from 4.72 to 50,000 at step 81" in page
    assert list(Report(results).summary()["unstable"]) == ["mamba/seed=0"]
    assert "its spread is unknown; Mamba blew up on the way and came back); on the training curves" in page
    for draw in (loss_curves, validation_curves, loss_gap):
        low, high = draw(results).axes[0].get_ylim()
        assert high - low < 6


def test_arms_that_are_searched_at_points_of_their_own_are_not_said_to_share_them(tmp_path: Path) -> None:
    arms = {"mamba": {"preset": "mamba-demo", "sweep": {}}, "moe-mamba": {"preset": "moe-mamba-demo"}}
    for name, experiment, said in (
        ("shared", comparison(seeds=[0]), "The same points for every arm, with seed 0"),
        ("own", comparison(seeds=[0], arms=arms), "Each arm over points of its own, with seed 0"),
    ):
        write_experiment(tmp_path / name, experiment, steps=STEPS)
        assert said in Report(read_results(tmp_path / name)).document().html()


def test_a_run_that_blew_up_for_good_is_not_said_to_have_come_back(tmp_path: Path) -> None:
    def lost(steps: np.ndarray, run: Run) -> np.ndarray:
        return np.where((run.arm == "mamba") & (steps > 80), 50.0, power_law(steps, run))

    write_experiment(tmp_path, comparison(sweep={}, seeds=[0]), lost, steps=STEPS)
    page = Report(read_results(tmp_path)).document().html()
    assert "The training loss rose, and did not come back: of <code>mamba/seed=0</code>" in page
    assert "its spread is unknown; Mamba blew up and did not come back)." in page  # the speedup tells nothing
    assert [row[5] for row in rows(page, "Held-out loss")[:2]] == ["1", "–"]
    assert "came back" not in page


def test_a_run_whose_first_step_had_no_target_is_reported(tmp_path: Path) -> None:
    write_experiment(tmp_path, comparison(sweep={}, seeds=[0]), steps=STEPS)
    path = tmp_path / "runs" / "mamba" / "seed=0" / "metrics.jsonl"
    first, *others = path.read_text().splitlines()
    without = json.loads(first) | {"loss": None, "loss_ema": None}
    path.write_text("\n".join([json.dumps(without), *others]) + "\n")
    results = read_results(tmp_path)
    assert Report(results).document().html()
    assert Report(results).summary()["arms"]["moe-mamba"]["speedup"] == pytest.approx([1.5], abs=0.05)


def test_evaluations_that_do_not_compare_are_told_apart() -> None:
    whole = Evaluation(3.0, 20.1, 1.5, 0.4, 1000, 3000, 12)
    pieces = replace(whole, context_length=1024)
    assert read_how([("A", whole), ("B", whole)]).startswith("Documents are read whole")
    mixed = read_how([("A", whole), ("A", pieces), ("B", pieces)])
    assert "do not compare" in mixed
    assert "of A (some seeds) whole, however long" in mixed
    assert "of A whole" in read_how([("A", whole), ("B", pieces), ("C", pieces)])
    assert mixed.endswith("of the others in pieces of 1,024 tokens, each from an empty state.")


def test_a_sample_is_shown_as_it_was_written(results: Results) -> None:
    sample = Sample("if a < b:\n", "    return `x` **y**", "MoE-Mamba", "seed 0")
    page = Report(results, sample=sample).document().html()
    assert "<pre><code>if a &lt; b:\n    return `x` **y**</code></pre>" in page


def test_text_is_escaped_and_its_two_marks_work() -> None:
    page = Document("a < b", [Text("**1 < 2** and `x & y`"), Table(["t"], [[Literals(["a b", "<"])]])]).html()
    assert "<h1>a &lt; b</h1>" in page
    assert "<strong>1 &lt; 2</strong> and <code>x &amp; y</code>" in page
    assert "<code>a·b</code> <code>&lt;</code>" in page


def test_a_thinned_curve_is_smoothed_over_as_many_steps_as_the_whole(tmp_path: Path) -> None:
    write_experiment(tmp_path, comparison(seeds=[0], sweep={}), steps=400, noise=0.05)
    whole = _centred_loss(read_results(tmp_path).arm("mamba").runs[0])
    (metrics,) = tmp_path.glob("runs/mamba/*/metrics.jsonl")
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(lines[7::8]))
    thin = _centred_loss(read_results(tmp_path).arm("mamba").runs[0])
    np.testing.assert_allclose(thin[10:], whole[7::8][10:], atol=0.03)  # before, it falls too steeply
