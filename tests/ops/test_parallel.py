import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from switchmamba.ops.parallel import cut, run_parallel


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@given(st.integers(0, 300), st.integers(1, 40), st.integers(1, 16))
def test_slices_cover_the_range_once_in_order_and_begin_at_multiples(length, pieces, multiple):
    slices = cut(length, pieces, multiple)
    assert [i for start, stop in slices for i in range(start, stop)] == list(range(length))
    assert all(start < stop and start % multiple == 0 for start, stop in slices)
    assert len(slices) <= pieces


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("items", [0, 1, 2, 50])
def test_every_item_runs_once_with_all_arguments(items):
    ran = []
    run_parallel(lambda *arguments: ran.append(arguments), [(n, n + 1) for n in range(items)], "a", "b")
    assert sorted(ran) == [(n, n + 1, "a", "b") for n in range(items)]


@pytest.mark.usefixtures("three_threads")
def test_items_run_at_the_same_time():
    all_three = threading.Barrier(3, timeout=20)
    run_parallel(lambda _: all_three.wait(), [(0,), (1,), (2,)])


@pytest.mark.usefixtures("three_threads")
def test_an_error_in_any_thread_reaches_the_caller():
    def fail(item: int) -> None:
        if item == 7:
            raise ZeroDivisionError("item 7")

    with pytest.raises(ZeroDivisionError, match="item 7"):
        run_parallel(fail, [(n,) for n in range(20)])


def test_a_forked_process_gets_threads_of_its_own():
    script = """
import os, torch
from switchmamba.ops.parallel import run_parallel
torch.set_num_threads(2)
ran = []
run_parallel(lambda item: ran.append(item), [(0,), (1,), (2,)])
child = os.fork()
if child == 0:
    run_parallel(lambda item: ran.append(item), [(3,), (4,), (5,)])
    os._exit(0 if sorted(ran) == [0, 1, 2, 3, 4, 5] else 1)
raise SystemExit(os.waitpid(child, 0)[1])
"""
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", script], timeout=120).returncode == 0
