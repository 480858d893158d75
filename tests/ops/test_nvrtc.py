"""Compiling at run time: names of what is kept, writing, and what is said where it cannot work."""

import importlib.util
from pathlib import Path

import pytest
import torch

from switchmamba.ops import nvrtc

SOURCE = 'extern "C" __global__ void nothing() {}'


def test_a_kept_kernel_is_named_after_everything_it_depends_on():
    name = nvrtc.cache_name(SOURCE, {"N": 16, "M": 2}, "sm_90", (13, 0))
    assert name == nvrtc.cache_name(SOURCE, {"M": 2, "N": 16}, "sm_90", (13, 0))
    others = [
        nvrtc.cache_name(SOURCE + " ", {"N": 16, "M": 2}, "sm_90", (13, 0)),
        nvrtc.cache_name(SOURCE, {"N": 17, "M": 2}, "sm_90", (13, 0)),
        nvrtc.cache_name(SOURCE, {"N": 16, "M": 2}, "sm_80", (13, 0)),
        nvrtc.cache_name(SOURCE, {"N": 16, "M": 2}, "sm_90", (13, 1)),
    ]
    assert len({name, *others}) == 5


def test_the_options_are_part_of_the_name(monkeypatch):
    name = nvrtc.cache_name(SOURCE, {}, "sm_90", (13, 0))
    monkeypatch.setitem(nvrtc._OPTIONS, "fma", True)
    assert nvrtc.cache_name(SOURCE, {}, "sm_90", (13, 0)) != name


def test_a_kernel_is_compiled_once_and_then_read(tmp_path, monkeypatch):
    compilations = []
    monkeypatch.setenv("SWITCHMAMBA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(nvrtc, "compiler_version", lambda: (13, 0))
    monkeypatch.setattr(nvrtc, "_compile", lambda *of: compilations.append(of) or b"machine code")
    for _ in range(2):
        assert nvrtc.compiled(SOURCE, {"N": 1}, "sm_90") == b"machine code"
    assert compilations == [(SOURCE, {"N": 1}, "sm_90")]
    assert [path.read_bytes() for path in (tmp_path / "cache").iterdir()] == [b"machine code"]


def test_where_nothing_can_be_written_a_process_compiles_for_itself(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("SWITCHMAMBA_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(nvrtc, "compiler_version", lambda: (13, 0))
    monkeypatch.setattr(nvrtc, "_compile", lambda *of: b"machine code")
    assert nvrtc.compiled(SOURCE, {}, "sm_90") == b"machine code"
    assert "are not kept" in caplog.text


def test_a_write_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    path = tmp_path / "kept" / "kernel.cubin"
    nvrtc.write_atomically(path, b"first")

    def fail(*_of):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        nvrtc.write_atomically(path, b"second")
    assert path.read_bytes() == b"first"
    assert list(path.parent.glob("*")) == [path]


def test_the_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.delenv("SWITCHMAMBA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert nvrtc.cache_directory() == tmp_path / "switchmamba"


def test_what_is_missing_is_said():
    needs = nvrtc.needs_nvrtc
    assert needs(torch.device("cpu"), torch.float32) == "it needs a CUDA device, the inputs are on cpu"
    assert "float64" in needs(torch.device("cuda", 0), torch.float64)


@pytest.mark.parametrize("package", ["cuda.bindings", "cuda.core"])
def test_a_missing_package_is_named_with_the_remedy(monkeypatch, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find("torch"))
    assert nvrtc.missing_package() == (
        f"the package {package.replace('.', '-')} is not installed: install switchmamba[cuda]"
    )
