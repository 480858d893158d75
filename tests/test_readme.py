"""What the README promises is run: its quick start, its commands, and the targets it names."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from switchmamba.cli import main
from switchmamba.data.prepare import prepare
from tests.docs.blocks import run_by_a_test

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_quick_start_runs_and_is_about_ten_lines():
    (block,) = run_by_a_test(ROOT / "README.md", "python")
    assert len([line for line in block.splitlines() if line.strip()]) <= 12
    subprocess.run([sys.executable, "-W", "error", "-c", block], check=True, timeout=120)


def test_commands_run_in_the_order_of_the_readme(tmp_path):
    words = (ROOT / "README.md").read_text(encoding="utf-8").split()
    books = tmp_path / "books"
    books.mkdir()
    for i in range(8):
        (books / f"{i}.txt").write_text(" ".join(words[i::8] * 8), encoding="utf-8")
    commands = "\n".join(run_by_a_test(ROOT / "README.md", "bash"))
    assert all(
        f"switchmamba {name}" in commands
        for name in ("data prepare", "train", "evaluate", "generate", "info", "doctor")
    )
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", commands],
        cwd=tmp_path,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_configuration_trains_and_can_be_counted(tmp_path, capsys):
    (block,) = re.findall(r"```toml\n(.*?)```", README, flags=re.DOTALL)
    (tmp_path / "mine.toml").write_text(block, encoding="utf-8")
    (tmp_path / "text.txt").write_text(README, encoding="utf-8")
    mine, data = str(tmp_path / "mine.toml"), str(tmp_path / "data")
    prepare([tmp_path / "text.txt"], "bpe:300", data, validation_fraction=0.3)
    assert main(["info", mine]) == 0
    assert "806,461,952" in capsys.readouterr().out
    assert main(["info", mine, "--model.vocab_size", "300", "--json"]) == 0
    small = "--model.d_model 16 --model.num_blocks 1 --model.layers.moe.d_expert 8 --data.context_length 32"
    assert (
        main(["train", mine, "--data", data, "--out", str(tmp_path / "run"), "--steps", "1", *small.split()])
        == 0
    )
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["vocab_size"] == 300


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_every_make_target_that_is_named_exists(document):
    named = set(re.findall(r"\bmake ([a-z][a-z-]*)\b", (ROOT / document).read_text(encoding="utf-8")))
    targets = set(
        re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    )
    assert {"demo", "test"} <= named if document == "README.md" else named
    assert named <= targets


def test_every_file_that_is_linked_exists():
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        links = re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", document.read_text(encoding="utf-8"))
        for target in (a or b for a, b in links):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name} links {target}"


def test_prepared_data_and_runs_stay_out_of_git_and_the_package_data_does_not():
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    paths = ["data/english/index.json", "runs/mine/config.json", "src/switchmamba/data/new.py"]
    asked = subprocess.run(["git", "check-ignore", *paths], cwd=ROOT, capture_output=True, text=True)
    assert asked.stdout.splitlines() == paths[:2]
