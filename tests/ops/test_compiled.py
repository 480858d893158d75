import errno
import logging

import numba
import numpy as np
from numba.core.caching import IndexDataCacheFile
from numba.core.dispatcher import Dispatcher

from switchmamba.ops.compiled import compiled


def double(values):
    for i in range(values.size):
        values[i] *= 2


def doubled(kernel) -> list[float]:
    values = np.array([1.0, 2.0])
    kernel(values)
    return values.tolist()


def test_a_kernel_runs_where_numba_finds_no_directory_for_its_cache(monkeypatch, caplog):
    enable_caching = Dispatcher.enable_caching

    def no_directory(dispatcher):
        if dispatcher.py_func is double:  # numba caches functions of its own
            raise RuntimeError("cannot cache function 'double': no locator available")
        enable_caching(dispatcher)

    monkeypatch.setattr(Dispatcher, "enable_caching", no_directory)
    with caplog.at_level(logging.INFO, logger="switchmamba"):
        assert doubled(compiled(double)) == [2.0, 4.0]
    assert "double is compiled anew in every process" in caplog.text


def test_a_kernel_runs_when_the_disk_is_full(monkeypatch, caplog, tmp_path):
    def full(*_arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(IndexDataCacheFile, "save", full)
    kernel = compiled(double)
    assert doubled(kernel) == [2.0, 4.0]
    assert doubled(kernel) == [2.0, 4.0]
    assert caplog.text.count("compiled double is not kept on disk: [Errno 28]") == 1


def test_compiled_code_is_kept_on_disk(monkeypatch, tmp_path):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    assert doubled(compiled(double)) == [2.0, 4.0]
    assert list(tmp_path.rglob("*double*.nbc"))
