"""Which tokens the sample pass copies: in range, spread evenly, never in step with the sequence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prac_fx.passes.sample import sample_matrix, sample_positions

CPU = torch.device("cpu")
COUNTS = [1, 2, 3, 7, 16, 17, 64, 100, 128, 307, 512, 1000, 1024, 2048]


def _positions(count: int, tokens: int) -> Tensor:
    return sample_positions(count, tokens, CPU)


def _largest_gap(positions: Tensor, tokens: int) -> int:
    """Largest distance between neighbours, the last and the first being neighbours too."""
    ordered = positions.sort().values
    ends = torch.cat([ordered[1:], ordered[:1] + tokens])
    return int((ends - ordered).max())


@pytest.mark.parametrize("tokens", [1, 2, 5, 255, 256, 1000, 32768, 12345677, 2**33 + 1])
@pytest.mark.parametrize("count", COUNTS)
def test_positions_are_in_range(count: int, tokens: int) -> None:
    """Any number of tokens, down to one and beyond 32 bits."""
    found = _positions(count, tokens)
    assert found.shape == (count,)
    assert found.dtype == torch.int64
    assert int(found.min()) >= 0
    assert int(found.max()) < tokens


@pytest.mark.parametrize("factor", [3.0, 3.5, 4.0, 7.0, 10.0, 100.0])
@pytest.mark.parametrize("count", COUNTS)
def test_positions_are_distinct(count: int, factor: float) -> None:
    """No token is taken twice when there are three times as many."""
    for extra in range(3):
        assert _positions(count, int(count * factor) + extra).unique().numel() == count


@pytest.mark.parametrize("count", COUNTS)
def test_few_positions_coincide_when_tokens_are_scarce(count: int) -> None:
    """With as many tokens as positions some coincide, but most tokens are still taken."""
    for tokens in (count, count + 1, 2 * count):
        distinct = _positions(count, tokens).unique().numel()
        assert distinct >= 0.66 * count
    assert _positions(count, 2 * count).unique().numel() >= 0.9 * count


@pytest.mark.parametrize("factor", [1.0, 2.5, 10.0, 256.0])
@pytest.mark.parametrize("count", COUNTS)
def test_positions_are_spread_evenly(count: int, factor: float) -> None:
    """No stretch of tokens longer than a few average distances is left out."""
    tokens = int(count * factor)
    assert _largest_gap(_positions(count, tokens), tokens) <= 2.2 * tokens / count + 1


@pytest.mark.parametrize("sequence", [128, 256, 1000, 1024])
@pytest.mark.parametrize("batch", [8, 32, 128])
@pytest.mark.parametrize("count", [64, 128])
def test_positions_do_not_follow_the_sequence(count: int, batch: int, sequence: int) -> None:
    """Places within a sequence vary as widely as tokens do: a fixed stride would hit few of them."""
    within = _positions(count, batch * sequence) % sequence
    assert within.unique().numel() >= 0.45 * min(count, sequence)
    assert float(within.double().mean() / sequence) == pytest.approx(0.5, abs=0.1)
    eighths = torch.bincount(within * 8 // sequence, minlength=8)
    assert int(eighths.min()) >= 1


def test_every_place_of_the_papers_shape() -> None:
    """128 sequences of 256: all sampled tokens stand at different places, from different sequences."""
    found = _positions(128, 128 * 256)
    assert (found % 256).unique().numel() >= 96
    assert (found // 256).unique().numel() >= 96


def test_positions_are_the_same_each_time() -> None:
    """No randomness: forward and its recompilation take the same tokens."""
    state = torch.get_rng_state()
    assert torch.equal(_positions(100, 4096), _positions(100, 4096))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("shape", [(96, 5), (4, 24, 5)])
def test_sample_matrix_takes_rows(shape: tuple[int, ...]) -> None:
    """Rows of a matrix, or of a batch of matrices read as one."""
    x = torch.arange(96 * 5, dtype=torch.float32).view(shape)
    found = sample_matrix(x, torch.empty(16, 5))
    assert found.shape == (16, 5)
    assert torch.equal(found, x.reshape(96, 5)[_positions(16, 96)])
    assert found[:, 0].unique().numel() == 16


@pytest.mark.parametrize("tokens", [1, 3, 15])
def test_sample_matrix_repeats_when_tokens_are_few(tokens: int) -> None:
    """Fewer tokens than rows: every row is one of them, and most of them are there."""
    x = torch.arange(tokens, dtype=torch.float64)[:, None].expand(tokens, 4).contiguous()
    found = sample_matrix(x, torch.empty(16, 4))
    assert found.shape == (16, 4)
    assert torch.equal(found, x[found[:, 0].long()])
    assert found[:, 0].unique().numel() >= 0.8 * tokens
