"""Subspace numerics: orthonormal bases, a uniform tail, subspace iteration, seeded draws."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from prac_fx.codecs.subspace import (
    basis_error,
    initial_basis,
    is_basis,
    is_sound,
    join_basis,
    orthonormalize,
    refreshed_basis,
    seeded_generator,
    tail_scale,
    working_dtype,
)
from prac_fx.torch_compat import FakeTensorMode

DTYPES = [torch.float64, torch.float32]
# batch, n, r1, r2: middling, full rank either way, no principal part, no tail, and several blocks
SHAPES = [
    ((), 16, 4, 5),
    ((), 16, 8, 8),
    ((), 16, 15, 1),
    ((), 16, 1, 15),
    ((), 16, 0, 6),
    ((), 16, 0, 16),
    ((), 16, 6, 0),
    ((), 16, 16, 0),
    ((), 200, 60, 60),
    ((4,), 12, 3, 4),
    ((4,), 8, 4, 4),
    ((4,), 8, 0, 3),
    ((4,), 8, 3, 0),
]


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=_generator(seed), dtype=torch.float64).to(dtype)


def _orthonormal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return orthonormalize(_randn(*shape, seed=seed)).to(dtype)


def draw_tail(q1: Tensor, r2: int, generator: torch.Generator) -> Tensor:
    """A tail for a basis that stays."""
    shape = (*q1.shape[:-1], r2)
    return refreshed_basis(q1, torch.randn(shape, dtype=q1.dtype, generator=generator))[1]


def refresh_principal(rows: Tensor, q1: Tensor, iterations: int = 1) -> Tensor:
    """A principal basis alone."""
    return refreshed_basis(q1, q1.new_zeros(*q1.shape[:-1], 0), rows, iterations)[0]


def _assert_orthonormal(q: Tensor, dtype: torch.dtype) -> None:
    assert q.dtype == dtype
    eye = torch.eye(q.shape[-1], dtype=dtype).expand(*q.shape[:-2], -1, -1)
    atol = 1e-12 if dtype == torch.float64 else 5e-6
    torch.testing.assert_close(q.mT @ q, eye, rtol=0, atol=atol)


def _sine(a: Tensor, b: Tensor) -> float:
    """Sine of the largest principal angle between the spans of two orthonormal bases."""
    return float(torch.linalg.matrix_norm(b - a @ (a.mT @ b), ord=2).amax())


def _decaying(tokens: int, v: Tensor, r1: int, gap: float, seed: int, dtype: torch.dtype) -> Tensor:
    """(..., tokens, n) with right singular vectors `v`: r1 large singular values, then a gap."""
    n = v.shape[-1]
    u = _orthonormal(*v.shape[:-2], tokens, n, seed=seed)
    values = torch.linspace(2.0, 1.0, n, dtype=torch.float64)
    values[r1:] /= gap
    return ((u * values) @ v.mT).to(dtype)


def _as_rows(x: Tensor) -> Tensor:
    """Blocks (B, s, n) side by side, (s, B * n), as a sampled activation has them."""
    return x if x.dim() == 2 else x.transpose(0, 1).reshape(x.shape[1], -1).contiguous()


# -- bases ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "n", "r1", "r2"), SHAPES)
def test_bases_are_orthonormal(
    batch: tuple[int, ...], n: int, r1: int, r2: int, dtype: torch.dtype
) -> None:
    """Q1, Q2 and both together, at creation and for a later tail."""
    q1, q2 = initial_basis((*batch, n, r1 + r2), r1, dtype, _generator(1))
    assert q1.shape == (*batch, n, r1)
    assert q2.shape == (*batch, n, r2)
    _assert_orthonormal(torch.cat([q1, q2], dim=-1), dtype)
    tail = draw_tail(q1, r2, _generator(2))
    assert tail.shape == (*batch, n, r2)
    _assert_orthonormal(torch.cat([q1, tail], dim=-1), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "n", "r1", "r2"), [s for s in SHAPES if s[2]])
def test_refreshed_bases_are_orthonormal(
    batch: tuple[int, ...], n: int, r1: int, r2: int, dtype: torch.dtype
) -> None:
    """After a refresh too, whose rows are anything, and for the tail drawn after it."""
    rows = _randn(2 * n, math.prod(batch) * n, seed=3, dtype=dtype)
    q1 = refresh_principal(rows, _orthonormal(*batch, n, r1, dtype=dtype), iterations=2)
    tail = draw_tail(q1, r2, _generator(2))
    _assert_orthonormal(torch.cat([q1, tail], dim=-1), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("length", [1.0, 1e-30, 1e30])
def test_orthonormalize_agrees_with_householder(
    length: float, condition: float, dtype: torch.dtype
) -> None:
    """Also for columns that nearly depend on each other, and for huge and tiny ones."""
    u, v = _orthonormal(4, 60, 20, seed=1), _orthonormal(4, 20, 20, seed=2)
    values = torch.logspace(0, -math.log10(condition), 20, dtype=torch.float64)
    a = (length * (u * values) @ v.mT).to(dtype)
    q = orthonormalize(a)
    _assert_orthonormal(q, dtype)
    expected = torch.linalg.qr(a.double() / length)[0]
    expected = expected * (expected * q).sum(dim=-2, keepdim=True).sign()
    torch.testing.assert_close(q, expected.to(dtype), rtol=0, atol=1e-16 * condition**2 + 1e-6)


@pytest.mark.parametrize("kind", ["equal", "zero", "infinite", "NaN"])
def test_orthonormalize_says_what_has_no_basis(kind: str) -> None:
    """That matrix is NaN; the others of the batch are not touched by it."""
    a = _randn(3, 10, 4)
    a[1, :, 2] = {"equal": a[1, :, 0], "zero": 0.0, "infinite": math.inf, "NaN": math.nan}[kind]
    q = orthonormalize(a)
    assert q[1].isnan().all()
    _assert_orthonormal(q[::2], torch.float64)
    assert torch.equal(q[0], orthonormalize(a[:1])[0])


@pytest.mark.parametrize("iterations", [0, 1, 4])
@pytest.mark.parametrize("blocks", [1, 4])
def test_a_batch_is_as_many_refreshes(blocks: int, iterations: int) -> None:
    """Sites that are refreshed together do not see each other, whatever the rows of one are."""
    sites, n = 5, 32 // blocks
    shape = (sites, n, 3) if blocks == 1 else (sites, blocks, n, 3)
    q1, directions = _orthonormal(*shape, seed=1), _randn(*shape, seed=2)
    rows = _randn(sites, 20, 32, seed=3)
    rows[1] *= 1e6
    rows[2] = 0
    rows[3, 5, 7] = math.nan
    together = refreshed_basis(q1, directions, rows, iterations)
    for site in range(sites):
        alone = refreshed_basis(q1[site], directions[site], rows[site], iterations)
        for expected, found in zip(alone, together, strict=True):
            torch.testing.assert_close(found[site], expected, rtol=0, atol=1e-9)


def test_a_refresh_asks_nothing_of_the_device() -> None:
    """Fake tensors have no values: whoever asks for one gets an error."""
    with FakeTensorMode():
        q1, directions = torch.empty(2, 16, 4), torch.empty(2, 16, 5)
        found = refreshed_basis(q1, directions, torch.empty(2, 8, 16), 4)
        assert [part.shape for part in found] == [(2, 16, 4), (2, 16, 5)]
        assert is_sound(basis_error(join_basis(*found), 4)).shape == (2,)


def test_scale_is_that_of_theorem_6() -> None:
    """The scale k = (n - r1) / r2, and 1 where there is no tail."""
    assert tail_scale(768, 230, 230) == (768 - 230) / 230
    assert tail_scale(16, 0, 4) == 4.0
    assert tail_scale(16, 8, 8) == 1.0
    assert tail_scale(16, 4, 0) == 1.0


@pytest.mark.parametrize(("batch", "n", "r1", "r2"), SHAPES)
def test_join_basis(batch: tuple[int, ...], n: int, r1: int, r2: int) -> None:
    """P P^T = Q1 Q1^T + k Q2 Q2^T."""
    q1, q2 = initial_basis((*batch, n, r1 + r2), r1, torch.float64, _generator(1))
    p = join_basis(q1, q2)
    assert p.shape == (*batch, n, r1 + r2)
    assert torch.equal(p[..., :r1], q1)
    torch.testing.assert_close(p @ p.mT, q1 @ q1.mT + tail_scale(n, r1, r2) * q2 @ q2.mT)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize(("batch", "n", "r1", "r2"), SHAPES)
def test_is_basis(batch: tuple[int, ...], n: int, r1: int, r2: int, dtype: torch.dtype) -> None:
    """Rounding to any dtype is tolerated, in many draws; one wrong column, wherever it is, never."""
    for seed in range(20):
        q1, q2 = initial_basis((*batch, n, r1 + r2), r1, torch.float64, _generator(seed))
        p = join_basis(q1, q2).to(dtype)
        assert is_basis(p, r1)
        assert is_basis(p[..., :r1], r1)
    before = p.clone()
    for column in range(r1 + r2):
        for factor in (0.0, 0.9, 1.1, 1e4, math.nan, math.inf):
            wrong = p.clone()
            wrong[..., column] *= factor
            assert not is_basis(wrong, r1)
        if column:
            wrong = p.clone()
            wrong[..., column] = p[..., column - 1]
            assert not is_basis(wrong, r1)
    assert torch.equal(p, before)


def test_a_basis_has_the_scale_of_its_tail() -> None:
    """Orthonormal columns alone are not P where there is a tail."""
    q = _orthonormal(16, 8)
    assert is_basis(q, 8)
    assert not is_basis(q, 4)
    assert is_basis(join_basis(q[:, :4], q[:, 4:]), 4)
    assert is_basis(q[:, :0], 0)


def test_working_dtype() -> None:
    """Low precision is worked on in float32, and float64 stays."""
    assert working_dtype(torch.float64) == torch.float64
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert working_dtype(dtype) == torch.float32


# -- the tail -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "n", "r1", "r2"),
    [((), 10, 4, 2), ((), 10, 3, 6), ((), 8, 0, 3), ((), 9, 8, 1), ((3,), 6, 2, 2)],
)
def test_tail_is_uniform_in_the_complement(
    batch: tuple[int, ...], n: int, r1: int, r2: int
) -> None:
    """E[Q2 Q2^T] = r2 / (n - r1) (I - Q1 Q1^T), within five standard errors."""
    q1, generator, draws = _orthonormal(*batch, n, r1), _generator(4), 4000
    tails = (draw_tail(q1, r2, generator) for _ in range(draws))
    projections = torch.stack([q2 @ q2.mT for q2 in tails])
    expected = r2 / (n - r1) * (torch.eye(n, dtype=torch.float64) - q1 @ q1.mT)
    error = projections.std(dim=0) / math.sqrt(draws)
    assert ((projections.mean(dim=0) - expected).abs() <= 5 * error + 1e-12).all()


def test_tail_has_no_preferred_direction() -> None:
    """One direction of the complement is as likely as another: fourth moments, and signs cancel."""
    n, r1, draws = 7, 2, 4000
    q1, generator = _orthonormal(n, r1), _generator(5)
    complement = torch.linalg.svd(q1)[0][:, r1:]
    inside = torch.stack(
        [(complement.mT @ draw_tail(q1, 1, generator))[:, 0] for _ in range(draws)]
    )
    d = n - r1
    torch.testing.assert_close(inside.norm(dim=1), torch.ones(draws, dtype=torch.float64))
    moments = inside.pow(4)
    error = moments.std(dim=0) / math.sqrt(draws)
    assert ((moments.mean(dim=0) - 3 / (d * (d + 2))).abs() <= 5 * error).all()


@pytest.mark.parametrize(
    ("n", "r1", "r2"), [(64, 20, 20), (64, 32, 32), (64, 48, 16), (64, 63, 1), (64, 8, 56)]
)
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
def test_tail_of_a_rounded_basis(n: int, r1: int, r2: int, stored: torch.dtype) -> None:
    """A Q1 that was stored in low precision is not quite orthonormal; its tail is orthogonal to it."""
    q1 = _orthonormal(n, r1, dtype=torch.float32).to(stored).to(torch.float32)
    tail = draw_tail(q1, r2, _generator(6))
    _assert_orthonormal(tail, torch.float32)
    assert float((q1.mT @ tail).abs().max()) < 1e-4


# -- the principal part ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [(), (4,)], ids=["B=1", "B=4"])
def test_refresh_from_cold(batch: tuple[int, ...], dtype: torch.dtype) -> None:
    """Four iterations from random directions find the top subspace of a matrix with a gap."""
    n, r1, work = 32, 5, working_dtype(dtype)
    v = _orthonormal(*batch, n, n, seed=1)
    rows = _as_rows(_decaying(48, v, r1, 8.0, 2, dtype))
    q1 = refresh_principal(rows, _orthonormal(*batch, n, r1, seed=3, dtype=work), iterations=4)
    assert q1.dtype == work
    _assert_orthonormal(q1, work)
    assert _sine(q1.double(), v[..., :r1]) < (2e-2 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("batch", [(), (4,)], ids=["B=1", "B=4"])
def test_refresh_follows_drift(batch: tuple[int, ...]) -> None:
    """Warm, one iteration is enough: five times in a row the subspace moves and is found again."""
    n, r1 = 32, 5
    v = _orthonormal(*batch, n, n, seed=1)
    q1 = v[..., :r1].contiguous()
    for step in range(5):
        v = orthonormalize(v + 0.04 * _randn(*batch, n, n, seed=10 + step))
        moved = _sine(q1, v[..., :r1])
        assert moved > 0.1  # or there would be nothing to follow
        found = refresh_principal(_as_rows(_decaying(48, v, r1, 8.0, step, torch.float64)), q1)
        q1 = found
        after = _sine(q1, v[..., :r1])
        assert after < 0.25 * moved
        assert after < 0.1


def test_refresh_from_a_sample_of_rows() -> None:
    """A few rows of a large activation give directions that hold nearly all that the best ones do."""
    n, r1 = 32, 5
    x = _decaying(1024, _orthonormal(n, n, seed=1), r1, 8.0, 2, torch.float64)
    sample = x[torch.randperm(1024, generator=_generator(3))[:64]]
    q1 = refresh_principal(sample, _orthonormal(n, r1, seed=4), iterations=4)
    best = torch.linalg.svdvals(x)[:r1].square().sum()
    assert float((x @ q1).square().sum() / best) > 0.98


def test_blocks_are_refreshed_one_by_one() -> None:
    """Each block sees its own features only: as many separate refreshes give the same."""
    rows, q1 = _randn(20, 4 * 8, seed=1), _orthonormal(4, 8, 3, seed=2)
    rows = rows / rows.abs().max()
    found = refresh_principal(rows, q1, iterations=2)
    for block in range(4):
        alone = refresh_principal(rows[:, block * 8 : (block + 1) * 8], q1[block], iterations=2)
        assert _sine(found[block], alone) < 1e-10


@pytest.mark.parametrize("batch", [(), (4,)], ids=["B=1", "B=4"])
@pytest.mark.parametrize("value", [0.0, math.inf, -math.inf, math.nan])
def test_refresh_refuses_rows_without_information(value: float, batch: tuple[int, ...]) -> None:
    """All zero, or a single number that is not finite: the old basis stays."""
    rows = torch.zeros(16, 32) if value == 0.0 else _randn(16, 32, seed=1, dtype=torch.float32)
    rows[3, 7] = value
    n = 32 // math.prod(batch)
    q1 = _orthonormal(*batch, n, 3, dtype=torch.float32)
    torch.testing.assert_close(refresh_principal(rows, q1, iterations=4), q1, rtol=0, atol=1e-6)


@pytest.mark.parametrize("batch", [(), (4,)], ids=["B=1", "B=4"])
@pytest.mark.parametrize("kind", ["few rows", "low rank"])
def test_refresh_keeps_old_directions(kind: str, batch: tuple[int, ...]) -> None:
    """Rows of rank 3 claim 3 of 8 directions; the rest of the old ones, which they miss, stays."""
    n, r1, rank = 16, 8, 3
    spanning = _randn(*batch, rank, n, seed=1)
    x = spanning if kind == "few rows" else _randn(*batch, 40, rank, seed=2) @ spanning
    old = _orthonormal(*batch, n, r1, seed=3)
    new = refresh_principal(_as_rows(x), old)
    _assert_orthonormal(new, torch.float64)
    assert _sine(new, orthonormalize(spanning.mT)) < 0.1
    # the old directions that are orthogonal to all rows, 5 of 8
    missed = old @ torch.linalg.svd(spanning @ old)[2].mT[..., rank:]
    assert missed.shape[-1] == r1 - rank
    assert _sine(new, missed) < 1e-10


def test_refresh_with_one_row() -> None:
    """One row, or equal ones: its direction is found, finite and orthonormal."""
    row = _randn(1, 16, seed=1, dtype=torch.float32)
    for rows in (row, row.expand(20, 16), torch.ones(20, 16)):
        q1 = refresh_principal(rows, _orthonormal(16, 4, dtype=torch.float32))
        _assert_orthonormal(q1, torch.float32)
        direction = rows[:1].mT / rows[:1].norm()
        assert _sine(q1, direction) < 0.05


def test_refresh_survives_a_dead_block() -> None:
    """One block of zeros beside others: finite and orthonormal, and the others are refreshed."""
    v = _orthonormal(4, 8, 8, seed=1)
    x = _decaying(20, v, 2, 8.0, 2, torch.float64)
    x[1] = 0
    q1 = refresh_principal(_as_rows(x), _orthonormal(4, 8, 2, seed=3), iterations=4)
    _assert_orthonormal(q1, torch.float64)
    for block in (0, 2, 3):
        assert _sine(q1[block], v[block, :, :2]) < 1e-2


@pytest.mark.parametrize(
    ("dtype", "exponent"),
    [
        (torch.float64, 1000),
        (torch.float64, -1000),
        (torch.float32, 120),
        (torch.float32, -120),
        (torch.bfloat16, 120),
        (torch.bfloat16, -120),
        (torch.float16, 13),
        (torch.float16, -10),
    ],
    ids=str,
)
def test_refresh_does_not_depend_on_scale(dtype: torch.dtype, exponent: int) -> None:
    """Squares of huge or tiny rows would overflow or vanish; the result is that of plain rows."""
    work = working_dtype(dtype)
    rows = _decaying(48, _orthonormal(32, 32, seed=1), 5, 8.0, 2, dtype)
    scaled = torch.ldexp(rows.to(work), torch.tensor(exponent)).to(dtype)
    assert scaled.isfinite().all()
    assert scaled.any()
    start = _orthonormal(32, 5, seed=3, dtype=work)
    plain, found = refresh_principal(rows, start, 4), refresh_principal(scaled, start, 4)
    _assert_orthonormal(found, work)
    assert _sine(found, plain) < (1e-2 if dtype.itemsize == 2 else 1e-5)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_refresh_of_rows_at_the_limit(dtype: torch.dtype) -> None:
    """Rows of the largest and of the smallest numbers there are."""
    for value in (torch.finfo(dtype).max, torch.finfo(dtype).tiny):
        rows = (_randn(20, 16, seed=1).sign() * value).to(dtype)
        assert rows.isfinite().all()
        q1 = refresh_principal(rows, _orthonormal(16, 4, dtype=working_dtype(dtype)), 4)
        _assert_orthonormal(q1, working_dtype(dtype))


def test_refresh_leaves_its_arguments_alone() -> None:
    """Neither the rows nor the old basis are changed in place."""
    rows, q1 = _randn(20, 16, seed=1), _orthonormal(16, 4)
    rows_before, q1_before = rows.clone(), q1.clone()
    refresh_principal(rows, q1, iterations=2)
    draw_tail(q1, 4, _generator())
    assert torch.equal(rows, rows_before)
    assert torch.equal(q1, q1_before)


# -- randomness -----------------------------------------------------------------------------------


def _drawn(*key: object) -> Tensor:
    return draw_tail(_orthonormal(12, 4), 3, seeded_generator(torch.device("cpu"), *key))


def test_same_key_same_bits() -> None:
    """A draw depends on its key only, whatever was drawn before."""
    first = _drawn(0, "layer", 3)
    _drawn(0, "layer", 4)
    assert torch.equal(_drawn(0, "layer", 3), first)


@pytest.mark.parametrize(
    "key", [(1, "layer", 3), (0, "other", 3), (0, "layer", 4), (0, "layer", "3"), (0, "layer")]
)
def test_different_key_different_bits(key: tuple[object, ...]) -> None:
    """Any part of the key matters, its type included."""
    assert not torch.allclose(_drawn(*key), _drawn(0, "layer", 3))


def test_key_parts_are_not_run_together() -> None:
    """("a", "bc") is not ("ab", "c")."""
    assert not torch.allclose(_drawn("a", "bc"), _drawn("ab", "c"))


def test_same_draws_in_another_process() -> None:
    """Seeds do not use Python's `hash`, which differs from process to process."""
    assert seeded_generator(torch.device("cpu"), "stream", 0).initial_seed() == 5992039231875187145


FUNCTIONS: dict[str, Callable[[], object]] = {
    "orthonormalize": lambda: orthonormalize(_randn(8, 3)),
    "draw_tail": lambda: draw_tail(_orthonormal(8, 3), 3, _generator(1)),
    "draw_tail, full rank": lambda: draw_tail(_orthonormal(8, 3), 5, _generator(1)),
    "initial_basis": lambda: initial_basis((8, 4), 2, torch.float32, _generator()),
    "refresh_principal": lambda: refresh_principal(_randn(9, 8), _orthonormal(8, 3), 4),
    "join_basis": lambda: join_basis(_orthonormal(8, 3), _orthonormal(8, 3)),
    "seeded_generator": lambda: torch.randn(
        3, generator=seeded_generator(torch.device("cpu"), "a", 1)
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_global_random_state_is_untouched(name: str) -> None:
    """The user's random stream is neither read nor advanced."""
    torch.manual_seed(1)
    before, first = torch.get_rng_state(), FUNCTIONS[name]()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = FUNCTIONS[name]()
    if isinstance(first, Tensor):
        assert isinstance(second, Tensor)
        assert torch.equal(first, second)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [(), (4,)], ids=["B=1", "B=4"])
def test_autocast_changes_nothing(half: torch.dtype, batch: tuple[int, ...]) -> None:
    """A step runs under the user's autocast; bases are made in full precision all the same."""
    n, r1, r2 = 64, 8, 6
    q1 = _orthonormal(*batch, n, r1, dtype=torch.float32)
    rows = 1000 * _randn(32, n * math.prod(batch), seed=1, dtype=torch.float32)

    def everything() -> list[Tensor]:
        refreshed = refresh_principal(rows, q1, iterations=2)
        initial = initial_basis((*batch, n, r1 + r2), r1, torch.float32, _generator(2))
        tail = draw_tail(q1, r2, _generator(3))
        checked = torch.tensor(is_basis(join_basis(q1, tail), r1))
        return [refreshed, *initial, tail, orthonormalize(rows.mT), checked]

    plain = everything()
    with torch.autocast("cpu", half):
        under_autocast = everything()
    for expected, found in zip(plain, under_autocast, strict=True):
        assert torch.equal(expected, found)
