"""The commands of the pages and the cells of the notebooks run, in order, as a reader would run them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = {
    "harness": "lm_eval",
    "huggingface": "transformers",
    "export": "gguf",
    "quantization": "torch",
    "finetuning": "peft",
}
"""Pages whose ``sh`` blocks are run, with the package that their extra brings."""

NOTEBOOKS = sorted(path.stem for path in (ROOT / "docs" / "notebooks").glob("*.ipynb"))


def environment(home: Path) -> dict[str, str]:
    commands = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "MPLBACKEND": "agg", "OMP_NUM_THREADS": "2"}
    return os.environ | offline | {"PATH": commands}


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run_in_an_empty_directory(page: str, tmp_path: Path) -> None:
    pytest.importorskip(PAGES[page])
    blocks = re.findall(
        r"^```sh\n(.*?)^```$", (ROOT / "docs" / f"{page}.md").read_text(), re.DOTALL | re.MULTILINE
    )
    assert blocks
    here = tmp_path / "here"
    here.mkdir()
    script = "set -euo pipefail\n" + "\n".join(blocks)
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=here,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_the_cells_of_a_notebook_run_in_order(notebook: str, tmp_path: Path) -> None:
    cells = json.loads((ROOT / "docs" / "notebooks" / f"{notebook}.ipynb").read_text())["cells"]
    source = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    for package in ("transformers", "gguf"):
        if re.search(rf"^\s*(from|import) {package}\b", source, re.MULTILINE):
            pytest.importorskip(package)
    script = tmp_path / f"{notebook}.py"
    script.write_text(source)
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_a_notebook_shows_what_it_computes_and_no_place_of_the_machine_it_ran_on(notebook: str) -> None:
    text = (ROOT / "docs" / "notebooks" / f"{notebook}.ipynb").read_text()
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] for cell in cells if "print(" in "".join(cell["source"]))
    assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])
    assert not re.search(r"/(tmp|home|root|work)/", text)
