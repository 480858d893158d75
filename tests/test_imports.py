"""The house's direction of imports, and what importing costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import switchmamba

ROOT = Path(switchmamba.__file__).parent

MAY_IMPORT = {
    "errors": set(),
    "extras": {"errors"},
    "config": {"errors"},
    "checkpoint": {"errors"},
    "data": {"errors", "config"},
    "ops": {"errors"},
    "layers": {"errors", "config", "ops"},
    "models": {"errors", "extras", "config", "checkpoint", "data", "ops", "layers"},
    "training": {"errors", "extras", "config", "checkpoint", "data", "ops", "layers", "models"},
    "generation": {"errors", "config", "checkpoint", "data", "ops", "layers", "models"},
    "interop": {"errors", "extras", "config", "checkpoint", "data", "ops", "layers", "models"},
    "evaluation": {
        "errors",
        "extras",
        "config",
        "checkpoint",
        "data",
        "ops",
        "layers",
        "models",
        "training",
        "generation",
    },
}
MAY_IMPORT["hf"] = {*MAY_IMPORT["training"], "training"}
MAY_IMPORT["interop"].add("hf")
EVERYTHING = {*MAY_IMPORT, "experiments", "cli"}
MAY_IMPORT["experiments"] = EVERYTHING - {"experiments", "cli"}
MAY_IMPORT["cli"] = EVERYTHING - {"cli"}


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("switchmamba.")}
    return rooms & EVERYTHING


@pytest.mark.parametrize("room", sorted(EVERYTHING))
def test_a_room_imports_only_what_lies_below_it(room):
    files = [ROOT / f"{room}.py"] if (ROOT / f"{room}.py").exists() else sorted((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        upward = imported_rooms(path) - MAY_IMPORT[room] - {room}
        assert not upward, f"{path.relative_to(ROOT)} imports {sorted(upward)}"


def test_every_room_of_the_house_is_in_the_plan():
    rooms = {
        p.stem if p.is_file() else p.name
        for p in ROOT.iterdir()
        if p.suffix == ".py" or (p / "__init__.py").exists()
    }
    assert rooms - {"__init__", "__main__"} == EVERYTHING


def test_importing_the_package_imports_neither_torch_nor_numba():
    code = "import sys, switchmamba, switchmamba.cli; sys.exit(bool({'torch', 'numba'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_public_names_are_few_sorted_and_importable():
    assert switchmamba.__all__ == sorted(switchmamba.__all__)
    assert set(switchmamba.__all__) == {"LanguageModel", "__version__", "load", "presets"}
    assert all(hasattr(switchmamba, name) for name in switchmamba.__all__)
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = switchmamba.nothing_here


FORBIDDEN = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal"}


def test_nothing_in_the_package_can_read_or_write_pickles():
    for path in ROOT.rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & FORBIDDEN, path
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "torch"
            ):
                # Other programs' .bin files are read in one place, as tensors and nothing else (below).
                assert node.attr not in {"load", "save"} or path.name == "foreign_weights.py", path
            if isinstance(node, ast.keyword):
                assert (
                    node.arg not in {"trust_remote_code", "allow_pickle"}
                    or ast.unparse(node.value) == "False"
                ), path


def test_the_one_reader_of_bin_files_takes_tensors_only():
    tree = ast.parse((ROOT / "interop" / "foreign_weights.py").read_text())
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("torch.")
    ]
    loads = [call for call in calls if ast.unparse(call.func) in {"torch.load", "torch.save"}]
    assert [ast.unparse(call.func) for call in loads] == ["torch.load"]
    assert {keyword.arg: ast.unparse(keyword.value) for keyword in loads[0].keywords}[
        "weights_only"
    ] == "True"
