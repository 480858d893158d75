"""How the experts' products of a decoding step are cut: what fits in shared memory, and what is refused."""

import pytest

from switchmamba.ops.fused_step.experts_cuda import tile

SHARED_BYTES = 227 * 1024


@pytest.mark.parametrize("count", [17, 64, 300, 1024, 2048])
@pytest.mark.parametrize("experts", [2, 42, 256])
@pytest.mark.parametrize(("d_model", "d_expert"), [(512, 1536), (768, 2304), (1024, 2048), (256, 512)])
@pytest.mark.parametrize("gates", [1, 2])
def test_a_tile_fits_and_divides_the_matrix(count, experts, d_model, d_expert, gates):
    for columns, outputs, matrices in ((d_model, d_expert, gates), (d_expert, d_model, 1)):
        rows, tokens, stages = tile(columns, outputs, matrices, count, experts)
        held = (
            (stages * rows * matrices + tokens) * (columns + 32) * 2
        )  # 16-bit numbers, a gap after each row
        sums, lists = 8 * tokens * 20 * 4, 4 * (count + experts)
        assert held + sums + lists <= SHARED_BYTES
        assert stages >= 2
        assert outputs % rows == 0
        assert tokens % 8 == 0


def test_tokens_of_most_experts_fit_at_once():
    assert tile(512, 1536, 1, 64, 42).tokens == 8
    assert tile(512, 1536, 1, 1024, 42).tokens == 40


@pytest.mark.parametrize(("columns", "outputs"), [(40, 24), (512, 24), (500, 512), (16384, 512)])
def test_shapes_that_no_tile_fits_are_refused(columns, outputs):
    assert tile(columns, outputs, 1, 64, 42) is None
