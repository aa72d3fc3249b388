"""Subspace state: ownership, random streams, the refresh schedule, saving and loading."""

from __future__ import annotations

import copy
import gc
import hashlib
import io
import random
import weakref
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prac_fx import CheckpointState
from prac_fx.codecs import PracCodec
from prac_fx.codecs.subspace import basis_error, is_basis
from prac_fx.config import PracConfig
from prac_fx.errors import StateError
from prac_fx.passes.choose import ENCODABLE_DTYPES
from prac_fx.runtime.random_streams import Draws, identity_of
from prac_fx.runtime.refresh import refresh, stagger
from prac_fx.runtime.rounding_seed import RoundingSeed, rounding_seed_of, step_number
from prac_fx.runtime.saved_entries import DTYPES as SAVED_DTYPES
from prac_fx.runtime.saved_entries import NUMBERS
from prac_fx.runtime.state_dict import STATE_VERSION, load_state_dict, state_dict
from prac_fx.runtime.subspace_state import (
    Subspace,
    SubspaceKey,
    rounding_seed_for,
    subspace_for,
    subspaces_of,
)
from prac_fx.torch_compat import FakeTensorMode, autograd_references

CPU = torch.device("cpu")
PRAC = PracCodec(features=16, principal=4, random=4, blocks=1, sample_rows=16)
PRAC_4 = PracCodec(features=32, principal=8, random=8, blocks=4, sample_rows=16)
RAC = PracCodec(features=16, principal=0, random=4, blocks=1, sample_rows=0)
PAC = PracCodec(features=16, principal=4, random=0, blocks=1, sample_rows=16)
CODECS = [PRAC, PRAC_4, RAC, PAC]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def _randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def _parameter(seed: int = 0) -> nn.Parameter:
    return nn.Parameter(_randn(8, 16, seed=seed))


def _key(codec: PracCodec = PRAC, slot: int = 0, dtype: torch.dtype = torch.float32) -> SubspaceKey:
    return SubspaceKey(slot, codec, dtype)


def _subspace(
    owner: Tensor,
    key: SubspaceKey | None = None,
    name: str = "weight",
    config: PracConfig | None = None,
    replica: int = 0,
) -> Subspace:
    draws = Draws(name, identity_of([owner]), replica)
    return subspace_for(owner, key or _key(), CPU, draws, config or PracConfig())


def _begin_step(subspace: Subspace) -> None:
    """Before a forward pass: as the wrapper of a compiled graph does."""
    if subspace.begin_step():
        refresh([subspace])


def _forward(subspace: Subspace, step: int) -> None:
    """One training forward pass: begin it, then write the rows as the compiled graph does."""
    _begin_step(subspace)
    if subspace.rows is not None:
        subspace.rows.copy_(_randn(*subspace.rows.shape, seed=step, dtype=subspace.rows.dtype))


def _steps_with_a_draw(subspace: Subspace, steps: int) -> list[int]:
    """The steps, counted from 0, before which something was refreshed."""
    found = []
    for step in range(steps):
        draws = subspace.draws
        _forward(subspace, step)
        if subspace.draws != draws:
            assert subspace.draws == draws + 1
            found.append(step)
    return found


def _is_sound(subspace: Subspace) -> bool:
    codec = subspace.key.codec
    return is_basis(subspace.basis, codec.principal // codec.blocks)


def _parts(subspace: Subspace) -> tuple[Tensor, Tensor]:
    r1 = subspace.key.codec.principal // subspace.key.codec.blocks
    return subspace.basis[..., :r1].clone(), subspace.basis[..., r1:].clone()


# -- ownership ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codec", CODECS, ids=PracCodec.describe)
def test_created_as_its_codec_says(codec: PracCodec, dtype: torch.dtype) -> None:
    """Shapes, dtype and bytes are those of the codec, and P P^T is a scaled projection."""
    owner = _parameter()
    subspace = _subspace(owner, _key(codec, dtype=dtype))
    assert subspace.basis.shape == codec.basis_shape
    assert subspace.basis.dtype == dtype
    assert not subspace.basis.requires_grad
    if codec.sample_rows:
        assert subspace.rows is not None
        assert subspace.rows.shape == (codec.sample_rows, codec.features)
        assert subspace.rows.dtype == dtype
    else:
        assert subspace.rows is None
    assert subspace.nbytes() == codec.state_nbytes(dtype.itemsize)
    p = subspace.basis.double()
    gram = torch.full((codec.rank // codec.blocks,), codec.scale, dtype=torch.float64)
    gram[: codec.principal // codec.blocks] = 1.0
    expected = torch.diag(gram).expand(*p.shape[:-2], -1, -1)
    torch.testing.assert_close(p.mT @ p, expected, rtol=0, atol=16 * torch.finfo(dtype).eps)


def test_created_once() -> None:
    """Later calls return the same object with the same tensors."""
    owner = _parameter()
    first = _subspace(owner)
    basis, address = first.basis, first.basis.data_ptr()
    second = _subspace(owner)
    assert second is first
    assert second.basis is basis
    assert second.basis.data_ptr() == address
    assert subspaces_of(owner) == {_key(): first}


def test_nothing_to_find() -> None:
    """A parameter without state has none, and asking does not create any."""
    owner = _parameter()
    assert subspaces_of(owner) == {}
    assert state_dict(nn.Linear(4, 4))["subspaces"] == []


def test_schedule_is_taken_from_the_last_options() -> None:
    """Compiling again with other options changes the schedule of the state that is there."""
    owner = _parameter()
    first = _subspace(owner, config=PracConfig(refresh_every=50))
    assert (first.refresh_every, first.tail_every) == (50, 50)
    second = _subspace(owner, config=PracConfig(refresh_every=200, tail_every=10))
    assert second is first
    assert (first.refresh_every, first.tail_every) == (200, 10)


def test_freed_with_its_parameter() -> None:
    """State holds no parameter, and goes when the parameter does."""
    owner = _parameter()
    subspace: Subspace | None = _subspace(owner)
    assert subspace is not None
    _forward(subspace, 0)
    _forward(subspace, 1)
    of_state, of_basis = weakref.ref(subspace), weakref.ref(subspace.basis)
    of_owner = weakref.ref(owner)
    subspace = None
    gc.collect()
    assert of_state() is not None
    del owner
    gc.collect()
    assert of_owner() is None
    assert of_state() is None
    assert of_basis() is None


def test_state_does_not_keep_its_parameter() -> None:
    """Whoever holds the state (compiled code does) does not hold the parameter."""
    owner = _parameter()
    subspace = _subspace(owner)
    of_owner = weakref.ref(owner)
    del owner
    gc.collect()
    assert of_owner() is None
    assert subspace.basis.isfinite().all()


def test_separate_for_each_slot_and_parameter() -> None:
    """Slots, codecs and dtypes of one parameter, and parameters: each has its own tensors."""
    owner, other = _parameter(0), _parameter(1)
    found = [
        _subspace(owner),
        _subspace(owner, _key(slot=1)),
        _subspace(owner, _key(RAC)),
        _subspace(owner, _key(dtype=torch.bfloat16)),
        _subspace(other),
    ]
    assert len({id(subspace) for subspace in found}) == 5
    assert len({subspace.basis.data_ptr() for subspace in found}) == 5
    assert len(subspaces_of(owner)) == 4
    assert len(subspaces_of(other)) == 1
    bases = [found[0], found[1], found[4]]
    assert len({subspace.stream for subspace in bases}) == 3
    assert not torch.allclose(found[0].basis, found[1].basis)
    assert not torch.allclose(found[0].basis, found[4].basis)


def test_created_within_inference_mode() -> None:
    """A first forward pass in inference mode does not spoil the state for training."""
    owner = _parameter()
    with torch.inference_mode():
        subspace = _subspace(owner)
    assert not subspace.basis.is_inference()
    assert subspace.rows is not None
    assert not subspace.rows.is_inference()
    for step in range(3):
        _forward(subspace, step)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_state_follows_its_values_to_another_device() -> None:
    """The same tensor objects on the other device: compiled graphs are bound to them."""
    owner, draws = _parameter(), Draws("weight", ())
    state = subspace_for(owner, _key(), CPU, draws, PracConfig())
    seed = rounding_seed_for(owner, CPU, draws, PracConfig())
    before = [state.basis, state.rows, seed.seed]
    gpu = torch.device("cuda", 0)
    assert subspace_for(owner, _key(), gpu, draws, PracConfig()) is state
    assert rounding_seed_for(owner, gpu, draws, PracConfig()) is seed
    after = [state.basis, state.rows, seed.seed]
    assert all(a is b for a, b in zip(after, before, strict=True))
    assert [t.device for t in after if t is not None] == [gpu] * 3
    for step in range(3):
        _forward(state, step)


# -- random streams -------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS, ids=PracCodec.describe)
def test_same_stream_in_the_next_run(codec: PracCodec) -> None:
    """Same seed, name and parameter numbers: the same basis now and after every refresh."""
    first, second = _parameter(), _parameter()
    a, b = _subspace(first, _key(codec)), _subspace(second, _key(codec))
    assert a is not b
    assert a.stream == b.stream
    for step in range(10):
        assert torch.equal(a.basis, b.basis)
        _forward(a, step)
        _forward(b, step)
    assert a.draws == b.draws > 1


@pytest.mark.parametrize("change", ["seed", "numbers", "name", "slot"])
def test_other_streams(change: str) -> None:
    """Another seed, parameter, name or slot: other directions."""
    first, second = _parameter(), _parameter(seed=1 if change == "numbers" else 0)
    a = _subspace(first)
    b = _subspace(
        second,
        _key(slot=1) if change == "slot" else None,
        "other" if change == "name" else "weight",
        PracConfig(seed=1) if change == "seed" else None,
    )
    assert a.stream != b.stream
    assert not torch.allclose(a.basis, b.basis)
    for step in range(3):
        _forward(a, step)
        _forward(b, step)
    assert not torch.allclose(_parts(a)[1], _parts(b)[1])


def test_stream_stays_when_the_parameter_trains() -> None:
    """The numbers are read once: an optimizer step changes no stream."""
    owner = _parameter()
    stream = _subspace(owner).stream
    with torch.no_grad():
        owner.mul_(2.0)
    assert _subspace(owner).stream == stream


@pytest.mark.parametrize("shape", [(), (1,), (3,), (0, 4), (5, 7, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_parameter_can_own(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Scalars, empty and transposed parameters have a stream too."""
    owner = nn.Parameter(_randn(*shape, dtype=dtype).mT if len(shape) > 1 else _randn(*shape))
    assert len(_subspace(owner).stream) == 32


@pytest.mark.parametrize("codec", CODECS, ids=PracCodec.describe)
def test_user_random_state_is_untouched(codec: PracCodec) -> None:
    """Neither creation nor any refresh reads or advances the global stream."""
    torch.manual_seed(3)
    before = torch.get_rng_state()
    owner = _parameter()
    subspace = _subspace(owner, _key(codec), config=PracConfig(refresh_every=2))
    for step in range(12):
        _forward(subspace, step)
    assert subspace.draws > 3
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    other = _parameter()
    assert _subspace(other, _key(codec)).stream == subspace.stream


def test_identity_is_that_of_the_largest_parameters() -> None:
    """The norms of all blocks are ones at first; what tells the blocks apart is a weight."""
    norm, first, second = nn.Parameter(torch.ones(16)), _parameter(0), _parameter(1)
    assert identity_of([norm, first]) == identity_of([norm, first]) != identity_of([norm, second])
    # neither does a zero matrix beside it, as LoRA has one
    zeros = nn.Parameter(torch.zeros(64, 16))
    assert identity_of([zeros, first]) != identity_of([zeros, second])


def test_parameters_without_readable_numbers_are_told_apart_by_their_order() -> None:
    """Quantised parameters, which need not know how to slice."""
    codes = nn.Parameter(torch.zeros(64, 16, dtype=torch.int8), requires_grad=False)
    first, second = identity_of([codes]), identity_of([codes])
    assert first != second
    assert identity_of([codes, _parameter()]) == identity_of([_parameter()])


@pytest.mark.parametrize("codec", CODECS, ids=PracCodec.describe)
def test_replicas_draw_independently_from_one_stream(codec: PracCodec) -> None:
    """One stream and one schedule for all, other directions for each, and the same ones again in the next run."""
    owners = [_parameter() for _ in range(4)]
    states = [
        _subspace(o, _key(codec), replica=r) for o, r in zip(owners, (0, 1, 2, 1), strict=True)
    ]
    assert len({state.stream for state in states}) == 1
    for step in range(5):
        bases = [state.basis.clone() for state in states]
        assert torch.equal(bases[1], bases[3])
        for a, b in ((0, 1), (0, 2), (1, 2)):
            assert not torch.allclose(bases[a], bases[b])
        for state in states:
            _forward(state, step)
    assert len({(state.draws, state.next_refresh) for state in states}) == 1


def test_replicas_round_independently() -> None:
    """Each replica has its own numbers in every step; replica 0 has those of a single process."""
    stream = hashlib.blake2b(b"a stream", digest_size=16).hexdigest()
    numbers = []
    for replica in (0, 1, 2):
        seed = RoundingSeed(torch.zeros((), dtype=torch.int64), stream, replica=replica)
        seen = []
        for _ in range(100):
            seed.begin_step()
            seen.append(int(seed.seed))
        numbers += seen
        assert seed.steps == 100
    assert len(set(numbers)) == 300
    assert numbers[:2] == [step_number(int(stream[:16], 16), step) for step in range(2)]


# -- schedule -------------------------------------------------------------------------------------


def _owners(count: int) -> list[nn.Parameter]:
    return [_parameter(seed) for seed in range(count)]


@pytest.mark.parametrize("every", [1, 2, 7, 50, 64, 200])
@pytest.mark.parametrize("codec", [PRAC, RAC], ids=["prac", "rac"])
def test_refresh_times(codec: PracCodec, every: int) -> None:
    """Over 500 steps: 1, 2, 4, ... up to the interval, and then every so many steps, on a grid."""
    owner = _parameter()
    subspace = _subspace(owner, _key(codec), config=PracConfig(refresh_every=every))
    stagger([subspace])
    found = _steps_with_a_draw(subspace, 500)
    doubling = [1]
    while 2 * doubling[-1] < every:
        doubling.append(2 * doubling[-1])
    assert found[: len(doubling)] == doubling
    grid = found[len(doubling) :]
    assert 1 <= grid[0] - doubling[-1] <= every
    assert {b - a for a, b in pairwise(grid)} <= {every}
    assert grid[-1] + every >= 500
    phase = subspace.phase % every
    assert {step % every for step in grid} == {phase}
    assert len(grid) == len([t for t in range(doubling[-1] + 1, 500) if t % every == phase])
    assert subspace.steps == 500


def _wide(owner: Tensor, features: int, config: PracConfig) -> Subspace:
    """A state whose basis takes a batch of its own from 1,024 features on."""
    codec = PracCodec(features, features // 2, features // 2, blocks=1, sample_rows=4)
    return _subspace(owner, _key(codec), config=config)


def test_refreshes_are_staggered_batch_by_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the doubling, batches are spread evenly, and alike states of a batch go together."""
    config = PracConfig(refresh_every=50)
    wide = [_wide(owner, 1024, config) for owner in _owners(5)]
    small = [_subspace(owner, config=config) for owner in _owners(12)]
    subspaces = [*wide[:2], *small, *wide[2:]]
    monkeypatch.setattr("prac_fx.runtime.refresh._refresh_alike", lambda *args: None)
    stagger(subspaces)
    at_step: dict[int, list[Subspace]] = {}
    for step in range(200):
        for subspace in subspaces:
            if subspace.begin_step():
                subspace.next_draw()
                at_step.setdefault(step, []).append(subspace)
    assert at_step[32] == subspaces
    later = {step: due for step, due in at_step.items() if step >= 100}
    assert sorted(len(due) for due in later.values()) == [1] * 10 + [12] * 2
    assert set(small) in [set(due) for due in later.values()]
    assert all(b - a >= 8 for a, b in pairwise(sorted(later)))


def test_graphs_are_staggered_differently() -> None:
    """Blocks that are compiled one by one have a graph each, with few states."""
    config = PracConfig(refresh_every=100)
    graphs = [[_subspace(owner, config=config)] for owner in _owners(24)]
    for subspaces in graphs:
        stagger(subspaces)
    assert len({subspaces[0].phase for subspaces in graphs}) > 16
    stagger([])


def test_late_refresh_returns_to_the_grid() -> None:
    """A refresh that had to wait shortens the next interval instead of moving the grid."""
    owner = _parameter()
    subspace = _subspace(owner, config=PracConfig(refresh_every=10))
    stagger([subspace])
    phase = subspace.phase
    for waited in range(15):
        step = 100 + phase + waited
        following = subspace._next_on_grid(step, 10)
        assert following % 10 == phase
        assert 1 <= following - step <= 10


@pytest.mark.parametrize(
    ("codec", "dtype"),
    [(PRAC, torch.float64), (PRAC, torch.float32), (PRAC_4, torch.float32), (PRAC, torch.bfloat16)],
    ids=str,
)
def test_tail_alone(codec: PracCodec, dtype: torch.dtype) -> None:
    """Between refreshes a new tail leaves Q1 as it is; the scaled tail stays orthogonal to it."""
    owner = _parameter()
    config = PracConfig(refresh_every=64, tail_every=4)
    subspace = _subspace(owner, _key(codec, dtype=dtype), config=config)
    principal, tails = set[int](), set[int]()
    for step in range(300):
        (q1, q2), draws = _parts(subspace), subspace.draws
        due = subspace.next_refresh
        _forward(subspace, step)
        new_q1, new_q2 = _parts(subspace)
        if subspace.draws == draws:
            assert torch.equal(subspace.basis, torch.cat([q1, q2], dim=-1))
            continue
        tails.add(step)
        assert not torch.allclose(new_q2, q2, rtol=0.1, atol=0.1)
        if step >= due:
            principal.add(step)
            assert not torch.allclose(new_q1, q1, rtol=0.1, atol=0.1)
        else:
            torch.testing.assert_close(new_q1, q1, rtol=0, atol=torch.finfo(dtype).eps)
        overlap = (new_q1.double().mT @ new_q2.double()).abs().max()
        assert float(overlap) < 8 * torch.finfo(dtype).eps
    assert sorted(principal)[:6] == [1, 2, 4, 8, 16, 32]
    assert 9 <= len(principal) <= 12
    assert len(tails) >= 300 // 4
    ordered = sorted(tails)
    assert max(b - a for a, b in pairwise(ordered)) <= 4


def test_first_refresh_finds_the_subspace() -> None:
    """From random directions, with what the first forward pass wrote, before the second one."""
    owner = _parameter()
    subspace = _subspace(owner, _key(dtype=torch.float64))
    # a gap of 3 is far too little for a single iteration
    u = torch.linalg.qr(_randn(16, 16, seed=1, dtype=torch.float64))[0]
    v = torch.linalg.qr(_randn(16, 16, seed=2, dtype=torch.float64))[0]
    values = torch.tensor([3.0] * 4 + [1.0] * 12, dtype=torch.float64)
    _begin_step(subspace)
    assert subspace.draws == 0
    assert subspace.rows is not None
    subspace.rows.copy_((u * values) @ v.mT)
    _begin_step(subspace)
    assert subspace.draws == 1
    q1, top = _parts(subspace)[0], v[:, :4]
    assert float(torch.linalg.matrix_norm(top - q1 @ (q1.mT @ top), ord=2)) < 0.05


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_rows_without_information_keep_the_principal_part(value: float) -> None:
    """An overflowed or an all-zero forward pass: Q1 stays, the tail is drawn, everything finite."""
    owner = _parameter()
    subspace = _subspace(owner, config=PracConfig(refresh_every=4))
    for step in range(9):
        _forward(subspace, step)
    assert subspace.rows is not None
    subspace.rows.fill_(value)
    (q1, q2), refreshed = _parts(subspace), 0
    for _ in range(12):
        draws = subspace.draws
        _begin_step(subspace)
        refreshed += subspace.draws - draws
    assert refreshed == 3
    new_q1, new_q2 = _parts(subspace)
    torch.testing.assert_close(new_q1, q1, rtol=0, atol=1e-6)
    assert not torch.allclose(new_q2, q2, rtol=0.1, atol=0.1)
    assert subspace.basis.isfinite().all()
    # and it recovers with the next good rows
    for step in range(9):
        _forward(subspace, step)
    assert not torch.allclose(_parts(subspace)[0], q1, rtol=0.1, atol=0.1)


def test_rac_draws_a_tail_on_schedule() -> None:
    """Without a principal part there are no rows, and `tail_every` is the schedule."""
    owner = _parameter()
    config = PracConfig(principal=0, refresh_every=50, tail_every=5)
    subspace = _subspace(owner, _key(RAC), config=config)
    seen = [subspace.basis.clone()]
    times = _steps_with_a_draw(subspace, 5)
    assert times == [1, 2, 4]
    for _ in range(45):
        _begin_step(subspace)
        if not torch.equal(subspace.basis, seen[-1]):
            seen.append(subspace.basis.clone())
    assert subspace.rows is None
    assert 9 <= len(seen) <= 12
    gram = RAC.scale * torch.eye(4)
    for basis in seen:
        torch.testing.assert_close(basis.mT @ basis, gram, rtol=0, atol=1e-5)


# -- a damaged basis ------------------------------------------------------------------------------

DAMAGES: dict[str, Callable[[Tensor], object]] = {
    "nan": lambda basis: basis.view(-1)[0].fill_(float("nan")),
    "inf": lambda basis: basis.view(-1)[0].fill_(float("inf")),
    "all nan": lambda basis: basis.fill_(float("nan")),
    "tail nan": lambda basis: basis[..., -1].fill_(float("nan")),
    "zero": lambda basis: basis.zero_(),
    "scaled": lambda basis: basis.mul_(3.0),
    "huge": lambda basis: basis.fill_(torch.finfo(basis.dtype).max),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codec", CODECS, ids=PracCodec.describe)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_basis_heals_at_the_next_refresh(
    damage: str, codec: PracCodec, dtype: torch.dtype
) -> None:
    """Whatever happened to it, principal part and tail are what a codec needs again, in place."""
    owner = _parameter()
    subspace = _subspace(owner, _key(codec, dtype=dtype), config=PracConfig(refresh_every=4))
    for step in range(9):
        _forward(subspace, step)
    address = subspace.basis.data_ptr()
    DAMAGES[damage](subspace.basis)
    assert not _is_sound(subspace)
    draws = subspace.draws
    for step in range(9, 14):
        _forward(subspace, step)
        assert _is_sound(subspace) == (subspace.draws > draws)
    assert subspace.draws > draws
    assert subspace.basis.data_ptr() == address


def test_a_new_tail_alone_heals_the_principal_part_too() -> None:
    """The first thing that is due makes it sound; the refreshes after it find the directions."""
    owner = _parameter()
    config = PracConfig(refresh_every=16, tail_every=4)
    subspace = _subspace(owner, _key(dtype=torch.float64), config=config)
    u = torch.linalg.qr(_randn(16, 16, seed=1, dtype=torch.float64))[0]
    v = torch.linalg.qr(_randn(16, 16, seed=2, dtype=torch.float64))[0]
    values = torch.tensor([3.0] * 4 + [1.0] * 12, dtype=torch.float64)
    for step in range(70):
        _forward(subspace, step)
    assert subspace.rows is not None
    subspace.rows.copy_((u * values) @ v.mT)
    while subspace.next_tail >= subspace.next_refresh:
        _begin_step(subspace)
    subspace.basis.fill_(float("nan"))
    while not subspace.basis.isfinite().all():
        assert subspace.steps <= subspace.next_tail
        _begin_step(subspace)
    assert _is_sound(subspace)
    for _ in range(4 * 16):
        _begin_step(subspace)
    q1, top = _parts(subspace)[0], v[:, :4]
    assert float(torch.linalg.matrix_norm(top - q1 @ (q1.mT @ top), ord=2)) < 0.05


@pytest.mark.parametrize("codec", [PRAC, PRAC_4, PAC], ids=PracCodec.describe)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_damaged_basis_and_rows_without_information(value: float, codec: PracCodec) -> None:
    """It starts again, stays sound, and follows the next good rows."""
    owner = _parameter()
    subspace = _subspace(owner, _key(codec), config=PracConfig(refresh_every=4))
    for step in range(9):
        _forward(subspace, step)
    assert subspace.rows is not None
    subspace.rows.fill_(value)
    subspace.basis.fill_(float("nan"))
    while not _is_sound(subspace):
        assert subspace.steps < 14
        _begin_step(subspace)
    first = _parts(subspace)[0]
    for _ in range(4):  # a sound basis stays now
        _begin_step(subspace)
    torch.testing.assert_close(_parts(subspace)[0], first, rtol=0, atol=1e-6)
    for step in range(5):
        _forward(subspace, step)
    assert not torch.allclose(_parts(subspace)[0], first, rtol=0.1, atol=0.1)


def test_steps_without_a_refresh_do_not_look_at_the_basis(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking costs time."""
    looked = []

    def recorded(basis: Tensor, r1: int) -> Tensor:
        looked.append(subspace.steps - 1)
        return basis_error(basis, r1)

    owner = _parameter()
    subspace = _subspace(owner, config=PracConfig(refresh_every=50))
    monkeypatch.setattr("prac_fx.runtime.refresh.basis_error", recorded)
    drawn = _steps_with_a_draw(subspace, 200)
    assert looked == drawn
    assert len(drawn) < 12


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_steps_without_a_refresh_do_not_wait_for_the_gpu() -> None:
    owner, draws = _parameter(), Draws("weight", ())
    state = subspace_for(owner, _key(), torch.device("cuda", 0), draws, PracConfig())
    for step in range(3):
        _forward(state, step)
    state.due = state.next_refresh = state.next_tail = 10**9
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            _begin_step(state)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("codec", CODECS, ids=PracCodec.describe)
def test_a_refresh_does_not_wait_for_the_gpu(codec: PracCodec) -> None:
    """Neither a cold nor a warm one, of one site or of several."""
    owners, draws = [_parameter(seed) for seed in range(3)], Draws("weight", ())
    gpu, config = torch.device("cuda", 0), PracConfig(refresh_every=1)
    states = [subspace_for(owner, _key(codec), gpu, draws, config) for owner in owners]
    refresh([state for state in states if state.begin_step()])  # libraries are loaded
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            refresh([state for state in states if state.begin_step()])
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert all(_is_sound(state) for state in states)


def test_a_refresh_of_many_sites_asks_nothing_of_the_device() -> None:
    """Fake tensors have no values: whoever asks for one gets an error."""
    owners = [_parameter(seed) for seed in range(3)]
    states = [_subspace(owner, config=PracConfig(refresh_every=1)) for owner in owners]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for state in states:
            state.basis = mode.from_tensor(state.basis)
            state.rows = None if state.rows is None else mode.from_tensor(state.rows)
            state.due = state.steps
            assert state.begin_step()
        refresh(states)


def test_sites_refreshed_together_are_as_if_alone() -> None:
    """Alike or not, due for a principal basis or not."""
    together = [_parameter(seed) for seed in range(6)]
    alone = [_parameter(seed) for seed in range(6)]
    codecs = [PRAC, PRAC, RAC, PRAC_4, PRAC_4, PRAC]
    config = PracConfig(refresh_every=8, tail_every=4)
    batch, single = (
        [_subspace(o, _key(c), config=config) for o, c in zip(owners, codecs, strict=True)]
        for owners in (together, alone)
    )
    for step in range(40):
        refresh([state for state in batch if state.begin_step()])
        for state in single:
            _begin_step(state)
        for seed, states in enumerate(zip(batch, single, strict=True)):
            for state in states:
                if state.rows is not None:
                    state.rows.copy_(_randn(*state.rows.shape, seed=100 * step + seed))
    for state, other in zip(batch, single, strict=True):
        assert state.draws == other.draws
        torch.testing.assert_close(state.basis, other.basis, rtol=0, atol=1e-5)


# -- a backward that is still to come --------------------------------------------------------------


@pytest.mark.parametrize("codec", [PRAC, RAC, PRAC_4], ids=PracCodec.describe)
def test_refresh_waits_for_backward(codec: PracCodec) -> None:
    """While a pending graph holds the basis it stays as it is; afterwards it is changed in place."""
    owner = _parameter()
    subspace = _subspace(owner, _key(codec), config=PracConfig(refresh_every=1))
    for step in range(3):
        _forward(subspace, step)
    assert subspace.draws == 2
    before, address, version = (
        subspace.basis.clone(),
        subspace.basis.data_ptr(),
        subspace.basis._version,
    )
    assert autograd_references(subspace.basis) == 1
    weight = nn.Parameter(_randn(*subspace.basis.mT.shape, seed=5))
    y = weight @ subspace.basis
    assert autograd_references(subspace.basis) > 1
    for step in range(4):
        _forward(subspace, step)
        assert torch.equal(subspace.basis, before)
        assert subspace.basis._version == version
    assert subspace.draws == 2
    assert subspace.steps == 7
    y.sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, torch.ones_like(y) @ before.mT)
    del y
    _begin_step(subspace)
    assert subspace.draws == 3
    assert not torch.allclose(subspace.basis, before, rtol=0.1, atol=0.1)
    assert subspace.basis.data_ptr() == address


def test_refresh_waits_for_all_of_several_backwards() -> None:
    """Gradient accumulation over two forward passes: the refresh comes after the last backward."""
    owner = _parameter()
    subspace = _subspace(owner, config=PracConfig(refresh_every=1))
    weight = nn.Parameter(_randn(3, 16, seed=5))
    outputs = []
    for step in range(4):
        _forward(subspace, step)
        outputs.append((weight @ subspace.basis).sum())
    assert subspace.draws == 0
    for left in (3, 2, 1):
        outputs.pop().backward()
        _begin_step(subspace)
        assert subspace.draws == 0, f"{left} backwards are still to come"
    outputs.pop().backward()
    _begin_step(subspace)
    assert subspace.draws == 1


def test_refresh_does_not_wait_for_an_abandoned_graph() -> None:
    """A forward pass whose result is dropped never has a backward."""
    owner = _parameter()
    subspace = _subspace(owner, config=PracConfig(refresh_every=1))
    _forward(subspace, 0)
    y = nn.Parameter(_randn(3, 16, seed=5)) @ subspace.basis
    del y
    _begin_step(subspace)
    assert subspace.draws == 1


# -- saving and loading ----------------------------------------------------------------------------


class _Model(nn.Module):
    """Two parameters that own four sites in all."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.first = nn.Linear(16, 8, bias=False)
        self.second = nn.Linear(32, 8, bias=False)
        with torch.no_grad():
            for index, parameter in enumerate(self.parameters()):
                parameter.copy_(_randn(*parameter.shape, seed=100 * seed + index))


CONFIG = PracConfig(refresh_every=6, tail_every=2)


def _bind(model: _Model, replica: int = 0) -> list[Subspace]:
    """What binding a compiled graph does: find or create the state of every site."""
    first, second = model.first.weight, model.second.weight
    sites = [
        (first, _key(PRAC, 0), "first.weight"),
        (first, _key(RAC, 1), "first.weight"),
        (second, _key(PRAC_4, 0), "second.weight"),
        (second, _key(PRAC_4, 1, torch.bfloat16), "second.weight"),
    ]
    return [_subspace(owner, key, name, CONFIG, replica) for owner, key, name in sites]


def _train(subspaces: list[Subspace], steps: range) -> list[Tensor]:
    """Copies of every basis after every step."""
    seen = []
    for step in steps:
        for subspace in subspaces:
            _forward(subspace, step)
            seen.append(subspace.basis.clone())
    return seen


def _through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def _assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def _assert_same_state(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["version"] == expected["version"]
    assert found["rounding"] == expected["rounding"]
    assert len(found["subspaces"]) == len(expected["subspaces"])
    for a, b in zip(found["subspaces"], expected["subspaces"], strict=True):
        assert a.keys() == b.keys()
        for name in a:
            same = (
                torch.equal(a[name], b[name]) if isinstance(a[name], Tensor) else a[name] == b[name]
            )
            assert same, name


@pytest.mark.parametrize("steps", [0, 1, 2, 5, 23])
def test_resumed_run_continues_bit_for_bit(steps: int) -> None:
    """Saved at any time and loaded into a fresh model with other numbers: the same from there on."""
    model = _Model(0)
    subspaces = _bind(model)
    _train(subspaces, range(steps))
    saved = _through_a_file(state_dict(model))
    expected = _train(subspaces, range(steps, steps + 20))
    fresh = _Model(1)
    load_state_dict(fresh, saved)
    resumed = _bind(fresh)
    _assert_same_state(state_dict(fresh), saved)
    _assert_same(_train(resumed, range(steps, steps + 20)), expected)


def test_loading_before_the_first_step_is_what_binding_finds() -> None:
    """State loaded before the first compiled step is used by it, not created anew."""
    model, fresh = _Model(0), _Model(1)
    _train(_bind(model), range(3))
    load_state_dict(fresh, state_dict(model))
    loaded = subspaces_of(fresh.first.weight)[_key(PRAC, 0)]
    assert _bind(fresh)[0] is loaded
    assert loaded.steps == 3


def test_loading_into_existing_state_overwrites_in_place() -> None:
    """Compiled code is bound to objects and addresses: both stay, their contents change."""
    model, other = _Model(0), _Model(1)
    subspaces, existing = _bind(model), _bind(other)
    _train(subspaces, range(7))
    _train(existing, range(20, 40))
    saved = _through_a_file(state_dict(model))
    expected = _train(subspaces, range(7, 27))
    bases, rows = [s.basis for s in existing], [s.rows for s in existing]
    addresses = [t.data_ptr() for t in [*bases, *rows] if t is not None]
    load_state_dict(other, saved)
    assert all(a is b for a, b in zip(_bind(other), existing, strict=True))
    assert all(s.basis is basis for s, basis in zip(existing, bases, strict=True))
    assert all(s.rows is one for s, one in zip(existing, rows, strict=True))
    assert [t.data_ptr() for t in [*bases, *rows] if t is not None] == addresses
    _assert_same_state(state_dict(other), saved)
    _assert_same(_train(existing, range(7, 27)), expected)
    assert [t.data_ptr() for t in [*bases, *rows] if t is not None] == addresses


def test_saved_state_is_a_copy() -> None:
    """Training on does not change what was saved, nor what was loaded from it."""
    model, fresh = _Model(0), _Model(1)
    subspaces = _bind(model)
    _train(subspaces, range(3))
    saved = state_dict(model)
    kept = copy.deepcopy(saved)
    _train(subspaces, range(3, 9))
    _assert_same_state(saved, kept)
    load_state_dict(fresh, saved)
    _train(_bind(fresh), range(3, 9))
    _assert_same_state(saved, kept)


def test_saved_state_is_plain() -> None:
    """Tensors, numbers and text only; every site of every parameter is there."""
    model = _Model(0)
    _bind(model)
    saved = state_dict(model)
    assert saved["version"] == STATE_VERSION
    named = [(entry["parameter"], entry["slot"], entry["dtype"]) for entry in saved["subspaces"]]
    assert named == [
        ("first.weight", 0, "float32"),
        ("first.weight", 1, "float32"),
        ("second.weight", 0, "float32"),
        ("second.weight", 1, "bfloat16"),
    ]
    for entry in saved["subspaces"]:
        for value in entry.values():
            assert isinstance(value, Tensor | int | str | list | dict | None)
        assert entry["parameter_shape"] == list(model.get_parameter(entry["parameter"]).shape)


def test_parameters_that_are_not_mentioned_keep_their_state() -> None:
    """A saved state of one layer changes that layer only."""
    model, other = _Model(0), _Model(1)
    _train(_bind(model), range(5))
    saved = state_dict(model)
    saved["subspaces"] = [e for e in saved["subspaces"] if e["parameter"] == "first.weight"]
    existing = _bind(other)
    untouched = [existing[2].basis.clone(), existing[3].basis.clone()]
    load_state_dict(other, saved)
    _assert_same([existing[2].basis, existing[3].basis], untouched)
    assert [s.steps for s in existing] == [5, 5, 0, 0]


@pytest.mark.parametrize("bound", [True, False], ids=["bound", "fresh"])
def test_state_of_another_replica_is_drawn_anew(bound: bool) -> None:
    """One rank saves and all load: principal directions are taken over, each rank gets a tail of its own."""
    saving, loading = _Model(0), _Model(1)
    _train(_bind(saving), range(5))
    saved = _through_a_file(state_dict(saving))
    if bound:
        _train(_bind(loading, replica=3), range(2))
    load_state_dict(loading, saved)
    for state, entry in zip(_bind(loading, replica=3), saved["subspaces"], strict=True):
        assert torch.equal(
            state.basis, entry["basis"]
        )  # not before the step: a backward may need it
        principal, draws, due = _parts(state)[0], state.draws, state.next_refresh
        _begin_step(state)
        assert (state.draws, state.steps, state.replica) == (draws + 1, 6, 3)
        if 5 < due:
            torch.testing.assert_close(_parts(state)[0], principal, rtol=0, atol=0.01)
        assert not torch.allclose(state.basis, entry["basis"], rtol=0.1, atol=0.1)
    again = _Model(2)
    load_state_dict(again, saved)
    for state in _bind(again):  # by the replica that saved it: only what is due
        expected = state.draws + (state.due <= 5)
        _begin_step(state)
        assert state.draws == expected


def test_parameters_that_the_model_lacks_can_be_left_out() -> None:
    """As when pipeline stages lie elsewhere: the rest is loaded."""
    model, other = _Model(0), _Model(1)
    _train(_bind(model), range(5))
    saved = state_dict(model)
    for entry in saved["subspaces"][:2]:
        entry["parameter"] = "third.weight"
    load_state_dict(other, saved, strict=False)
    assert subspaces_of(other.first.weight) == {}
    assert [s.steps for s in subspaces_of(other.second.weight).values()] == [5, 5]


# -- states that are refused -----------------------------------------------------------------------


@pytest.mark.parametrize("inside", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_loading_within_any_mode(inside: Callable[[], Any]) -> None:
    """The state can be refreshed afterwards."""
    model, fresh = _Model(0), _Model(1)
    _train(_bind(model), range(3))
    with inside():
        load_state_dict(fresh, state_dict(model))
    _train(_bind(fresh), range(3, 9))


def test_loaded_tensors_are_contiguous() -> None:
    """Compiled code takes them for that."""
    model, fresh = _Model(0), _Model(1)
    _train(_bind(model), range(3))
    saved = state_dict(model)
    for entry in saved["subspaces"]:
        entry["basis"] = entry["basis"].mT.contiguous().mT
        assert not entry["basis"].is_contiguous()
    load_state_dict(fresh, saved)
    assert all(state.basis.is_contiguous() for state in _bind(fresh))
    _assert_same_state(state_dict(fresh), saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_state_with_rows_of_an_overflow_resumes_bit_for_bit(value: float) -> None:
    """Half precision overflows now and then: what is saved then can be loaded, and continues as that run does."""
    model, fresh = _Model(0), _Model(1)
    subspaces = _bind(model)
    _train(subspaces, range(8))
    for subspace in subspaces:
        if subspace.rows is not None:
            subspace.rows[1, 2] = value
    saved = _through_a_file(state_dict(model))
    expected = _train(subspaces, range(8, 20))
    load_state_dict(fresh, saved)
    _assert_same(_train(_bind(fresh), range(8, 20)), expected)


def test_a_damaged_basis_is_not_saved() -> None:
    """What `state_dict` returns can always be loaded; that site starts anew, the others go on."""
    model, fresh = _Model(0), _Model(1)
    subspaces = _bind(model)
    _train(subspaces, range(5))
    subspaces[0].basis[0, 0] = float("nan")
    load_state_dict(fresh, _through_a_file(state_dict(model)))
    assert [state.steps for state in _bind(fresh)] == [0, 5, 5, 5]


def test_dtypes_that_can_be_saved_are_those_that_are_projected() -> None:
    assert set(SAVED_DTYPES.values()) == set(ENCODABLE_DTYPES)


def _trained(seed: int = 0, steps: int = 5) -> _Model:
    """With state of all kinds: four subspaces, and two seeds of rounding."""
    model = _Model(seed)
    _train(_bind(model), range(steps))
    for name, parameter in model.named_parameters():
        seeded = rounding_seed_for(parameter, CPU, Draws(name, (seed,)), CONFIG)
        for _ in range(steps):
            seeded.begin_step()
    return model


class _Broken(Mapping[str, Any]):
    """A mapping that fails however it is used, with an error of several lines."""

    def __getitem__(self, key: str) -> Any:
        raise RuntimeError("no\nitems")

    def __iter__(self) -> Iterator[str]:
        raise RuntimeError("no\nitems")

    def __len__(self) -> int:
        return 1

    def __repr__(self) -> str:
        raise RuntimeError("no\nrepr")


def _change(*path: Any, to: Any = None, by: Callable[[Any], Any] | None = None) -> Any:
    """A function that replaces what a path of keys leads to in a saved state."""

    def changed(saved: Any) -> Any:
        place = saved
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = to if by is None else by(place[path[-1]])
        return saved

    return changed


def _without(*path: Any) -> Any:
    def changed(saved: Any) -> Any:
        place = saved
        for key in path[:-1]:
            place = place[key]
        del place[path[-1]]
        return saved

    return changed


def _instead(value: object) -> Any:
    return lambda saved: value


def _last(field: str, to: Any = None, by: Callable[[Any], Any] | None = None) -> Any:
    return _change("subspaces", -1, field, to=to, by=by)


def _codec(**changes: Any) -> Any:
    return _last("codec", by=lambda codec: {**codec, **changes})


def _with(index: tuple[Any, ...], value: float) -> Callable[[Tensor], Tensor]:
    def changed(tensor: Tensor) -> Tensor:
        tensor[index] = value
        return tensor

    return changed


def _freed(tensor: Tensor) -> Tensor:
    tensor.untyped_storage().resize_(0)
    return tensor


def _swapped(basis: Tensor) -> Tensor:
    """Tail first."""
    return basis.roll(2, dims=-1)


# The last entry is `PRAC_4` in bfloat16: basis (4, 8, 4), rows (16, 32).
IN = "subspace state of 'second.weight'"
COUNT = "not a count from 0"
# what is changed in a saved state -> what the error says of it
REFUSED: dict[str, tuple[Any, str]] = {
    "version": (_change("version", to=99), f"expected version {STATE_VERSION}, got 99"),
    "no version": (_without("version"), f"expected version {STATE_VERSION}, got None"),
    "version as float": (_change("version", by=float), "got 4.0"),
    "version as tensor": (_change("version", by=torch.tensor), "got a Tensor of torch.int64"),
    "a list": (_instead([1]), f"expected version {STATE_VERSION}, got 'list'"),
    "nothing": (_instead(None), "got 'NoneType'"),
    "a text": (_instead("state"), "got 'str'"),
    "broken": (_instead(_Broken()), "not what state_dict.. returned: RuntimeError: no$"),
    "no subspaces": (_without("subspaces"), "field 'subspaces' is missing"),
    "no rounding": (_without("rounding"), "field 'rounding' is missing"),
    "one more part": (_change("more", to=1), "unknown field 'more'"),
    "subspaces as dict": (_change("subspaces", to={}), "subspaces is {}, not a list"),
    "subspaces as text": (_change("subspaces", to="ab"), "subspaces is 'ab', not a list"),
    "subspaces as iterator": (_change("subspaces", by=iter), "subspaces is .*, not a list"),
    "rounding is None": (_change("rounding", to=None), "rounding is None, not a list"),
    "entry is None": (_change("subspaces", -1, to=None), r"subspaces\[3\]: expected a mapping"),
    "entry is a list": (_change("subspaces", -1, to=[1]), r"a 'parameter', got \[1\]"),
    "entry is broken": (_change("subspaces", -1, to=_Broken()), "RuntimeError: no$"),
    "rounding entry is 3": (_change("rounding", 0, to=3), r"rounding\[0\]: expected a mapping"),
    "same twice": (
        _change("subspaces", by=lambda entries: [*entries, dict(entries[0])]),
        "subspace state of 'first.weight', slot 0 with this codec and dtype: there twice",
    ),
    "same seed twice": (
        _change("rounding", by=lambda entries: entries * 2),
        "rounding state of 'first.weight': there twice",
    ),
    # entries of subspaces
    "unknown parameter": (_last("parameter", "third.weight"), "no parameter 'third.weight'"),
    "parameter is a list": (_last("parameter", ["second.weight"]), "with a 'parameter', got"),
    "parameter of many lines": (_last("parameter", "a\nb"), r"no parameter 'a\\nb'"),
    "parameter of another shape": (
        _last("parameter", "first.weight"),
        r"saved for a parameter of shape \(8, 32\), the model's has \(8, 16\)",
    ),
    "other shape": (
        _last("parameter_shape", [8, 33]),
        r"shape \(8, 33\), the model's has \(8, 32\)",
    ),
    "shape is None": (_last("parameter_shape"), "parameter_shape is None, not a list"),
    "shape of texts": (_last("parameter_shape", ["8", "32"]), f"size in .* is '8', {COUNT}"),
    "unknown field": (_last("more", 1), f"{IN}: unknown field 'more', it has parameter, "),
    "unknown key": (_last(1, 1), f"{IN}: unknown field 1, it has"),  # type: ignore[arg-type]
    "slot is a list": (_last("slot", [1]), rf"{IN}: slot is \[1\], {COUNT}"),
    "slot is True": (_last("slot", True), f"slot is True, {COUNT}"),
    "slot is a tensor": (_last("slot", torch.tensor(0)), f"slot is a Tensor of .*, {COUNT}"),
    "slot is huge": (_last("slot", 10**5000), f"slot is a int, {COUNT}"),
    "codec is None": (_last("codec"), f"{IN}: codec is None, not a mapping of features"),
    "codec is broken": (_last("codec", _Broken()), "RuntimeError: no$"),
    "codec lacks blocks": (
        _without("subspaces", -1, "codec", "blocks"),
        "codec: field 'blocks' is",
    ),
    "codec has more": (_codec(more=1), "codec: unknown field 'more', it has features, "),
    "codec of floats": (_codec(features=32.0), f"codec.features is 32.0, {COUNT}"),
    "codec of bools": (_codec(blocks=True), f"codec.blocks is True, {COUNT}"),
    "no blocks": (_codec(blocks=0), "features and blocks are at least 1, but codec is"),
    "no features": (_codec(features=0, principal=0, random=0), "features and blocks are at least"),
    "rank above features": (_codec(principal=32), "principal . random is at least 1 and at most"),
    "no rank": (_codec(principal=0, random=0), "principal . random is at least 1 and at most"),
    "blocks do not divide": (_codec(blocks=5), "are divisible by blocks, but codec is"),
    "ranks do not divide": (_codec(random=7), "are divisible by blocks, but codec is"),
    "never sampled": (_codec(sample_rows=0), "there are sample_rows where there are principal"),
    "dtype of integers": (_last("dtype", "int64"), "dtype is 'int64', not one of float64, "),
    "dtype of 8 bits": (_last("dtype", "float8_e4m3fn"), "not one of float64, float32, bfl"),
    "dtype of complex": (_last("dtype", "complex64"), "not one of float64, float32, bfloat16"),
    "no dtype": (_last("dtype", "Tensor"), "dtype is 'Tensor', not one of"),
    "dtype as object": (_last("dtype", torch.bfloat16), "dtype is torch.bfloat16, not one of"),
    "another dtype": (_last("dtype", "float32"), "basis has dtype torch.bfloat16, the entry says"),
    "basis is None": (_last("basis"), f"{IN}: basis: expected a plain tensor, got None"),
    "basis is a list": (_last("basis", by=Tensor.tolist), "basis: expected a plain tensor"),
    "basis too narrow": (
        _last("basis", by=lambda basis: basis[..., :-1]),
        rf"{IN}: basis has shape \(4, 8, 3\), its codec needs \(4, 8, 4\)",
    ),
    "basis transposed": (_last("basis", by=lambda basis: basis.mT), r"has shape \(4, 4, 8\)"),
    "basis in float32": (_last("basis", by=Tensor.float), "has dtype torch.float32, the entry"),
    "integer basis": (_last("basis", by=Tensor.long), "has dtype torch.int64, the entry says"),
    "sparse basis": (_last("basis", by=Tensor.to_sparse), "expected a dense tensor, got"),
    "meta basis": (_last("basis", by=lambda basis: basis.to("meta")), "on meta without values"),
    "freed basis": (_last("basis", by=_freed), "basis: a tensor on cpu without values"),
    "nan in basis": (
        _last("basis", by=_with((0, 0, 0), float("nan"))),
        f"{IN}: basis: 1 of 128 numbers are not finite",
    ),
    "inf in basis": (_last("basis", by=_with((3, 7), float("-inf"))), "4 of 128 numbers are not"),
    "zero basis": (
        _last("basis", by=torch.zeros_like),
        f"{IN}: columns of basis are not orthogonal",
    ),
    "basis of ones": (_last("basis", by=torch.ones_like), "of length 1 and 8 of length 1.732"),
    "scaled basis": (_last("basis", by=lambda basis: basis * 2), "are not orthogonal, 8 of length"),
    "huge basis": (_last("basis", by=lambda basis: basis * 1e38), "are not orthogonal, 8 of len"),
    "tail first": (_last("basis", by=_swapped), "columns of basis are not orthogonal"),
    "a zero column": (_last("basis", by=_with((1, slice(None), 3), 0.0)), "are not orthogonal"),
    "a column twice": (
        _last("basis", by=lambda basis: basis[..., [0, 0, 2, 3]]),
        "columns of basis are not orthogonal",
    ),
    "no rows": (_last("rows"), r"rows are None, its codec needs \(16, 32\)"),
    "rows of rac": (_change("subspaces", 1, "rows", to=torch.ones(2)), "its codec needs None"),
    "rows too few": (_last("rows", by=lambda rows: rows[:-1]), r"rows has shape \(15, 32\), its"),
    "rows in float16": (_last("rows", by=Tensor.half), "rows has dtype torch.float16, the entry"),
    "meta rows": (_last("rows", by=lambda rows: rows.to("meta")), "rows: a tensor on meta"),
    "nan in rows": (_last("rows", by=_with((1, 2), float("nan"))), "rows: 1 of 512 numbers are"),
    "stream of words": (_last("stream", "not hexadecimal"), "'not hexadecimal', not 32 hexadec"),
    "stream of capitals": (_last("stream", by=lambda _: "A" * 32), "not 32 hexadecimal digits"),
    "stream of bytes": (_last("stream", b"0" * 32), "stream is b'0.*, not 32 hexadecimal"),
    **{
        f"{number} is {value}": (_last(number, value), f"{IN}: {number} is {value}, {COUNT}")
        for number in NUMBERS
        for value in (-1, True, None, 1.0)
    },
    **{
        f"no {field}": (_without("subspaces", -1, field), f"{IN}: field '{field}' is missing")
        for field in ("parameter_shape", "slot", "codec", "dtype", "basis", "rows", *NUMBERS)
    },
    # entries of rounding
    "seed of nobody": (_change("rounding", 1, "parameter", to="third"), "no parameter 'third'"),
    "seed: more": (_change("rounding", 1, "more", to=1), "unknown field 'more'"),
    "seed: no steps": (_without("rounding", 1, "steps"), "rounding state of .*: field 'steps' is"),
    "seed: steps": (_change("rounding", 1, "steps", to=True), f"steps is True, {COUNT}"),
    "seed: stream": (_change("rounding", 1, "stream", to="z" * 32), "not 32 hexadecimal digits"),
}


@pytest.mark.parametrize("bound", [True, False], ids=["bound", "fresh"])
@pytest.mark.parametrize("what", REFUSED)
def test_state_that_does_not_fit_changes_nothing(what: str, bound: bool) -> None:
    """One line says what is wrong, even in the last entry, and nothing was loaded by then."""
    change, message = REFUSED[what]
    other = _trained(1, steps=3) if bound else _Model(1)
    before = state_dict(other)
    with pytest.raises(StateError, match=message) as caught:
        load_state_dict(other, change(state_dict(_trained())))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 320
    _assert_same_state(state_dict(other), before)


@pytest.mark.parametrize("strict", [True, False])
def test_entries_that_are_left_out_have_to_name_their_parameter(strict: bool) -> None:
    saved = state_dict(_trained())
    del saved["subspaces"][0]["parameter"]
    with pytest.raises(StateError, match=r"subspaces\[0\]: expected a mapping"):
        load_state_dict(_Model(1), saved, strict=strict)


@pytest.mark.parametrize("kind", ["meta", "lazy"])
def test_a_model_without_values_is_refused(kind: str) -> None:
    """Initialising it would replace or move its parameters, and the state with them would be lost in silence."""
    saved = state_dict(_trained())
    model: nn.Module = _Model(1).to("meta")
    if kind == "lazy":
        model = nn.ModuleDict({"first": nn.LazyLinear(8), "second": nn.LazyLinear(8)})
    with pytest.raises(StateError, match=r"parameter 'first.weight' has no values yet"):
        load_state_dict(model, saved)
    assert not any(subspaces_of(parameter) for parameter in model.parameters())


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        ([1], r"expected a mapping, got \[1\]"),
        ({"rank_0": "text"}, "entry 'rank_0': expected bytes, got str"),
        ({"rank_0": b"not a file\nof torch"}, "entry 'rank_0' cannot be read: "),
        ({"shared": b""}, "entry 'shared' cannot be read: "),
        ({"shared": "damaged"}, f"{IN}: slot is -1, {COUNT}"),
    ],
)
def test_checkpoint_that_does_not_fit_changes_nothing(packed: Any, message: str) -> None:
    """The same for state in `torch.distributed.checkpoint`."""
    if packed == {"shared": "damaged"}:
        file = io.BytesIO()
        torch.save(_last("slot", -1)(state_dict(_trained())), file)
        packed = {"shared": file.getvalue()}
    other = _trained(1, steps=3)
    before = state_dict(other)
    with pytest.raises(StateError, match=message) as caught:
        CheckpointState(other).load_state_dict(packed)
    assert "\n" not in str(caught.value)
    _assert_same_state(state_dict(other), before)


def _places(saved: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to everything in nested lists and dicts."""
    found = [path] if path else []
    keys = saved if isinstance(saved, dict) else range(len(saved) if isinstance(saved, list) else 0)
    for key in keys:
        found += _places(saved[key], (*path, key))
    return found


def _damaged(saved: Any, choice: random.Random) -> Any:
    """With something in it replaced, left out, repeated, or a number of a tensor changed."""
    path = choice.choice(_places(saved))
    place = saved
    for key in path[:-1]:
        place = place[key]
    old = place[path[-1]]
    values = [None, True, -1, 0, 1, 3, 2**64, 0.5, "", "float32", [], {}, [1], {"slot": 0}, (8, 16)]
    how = choice.choice(("replace", "leave out", "repeat", "nudge", "nudge"))
    if how == "leave out":
        del place[path[-1]]
    elif how == "repeat" and isinstance(place, list):
        place.append(copy.deepcopy(old))
    elif type(old) is int and how == "nudge":
        place[path[-1]] = old + choice.choice([-3, -1, 1, 2, 1000])
    elif how == "nudge" and isinstance(old, Tensor):
        changed = choice.choice(
            [
                lambda: old.float() * choice.choice([0.0, 0.5, 1.01, 2.0, 1e30]),
                lambda: old.to(choice.choice([*DTYPES, torch.int8, torch.bool])),
                lambda: old.mT,
                lambda: old.flatten()[:-1],
                lambda: old.flip(-1),
                lambda: torch.randn(old.shape).to(old.dtype),
            ]
        )()
        if choice.random() < 0.5:
            number = choice.choice([0.0, 0.02, 7.0, 1e38, float("nan"), float("inf")])
            changed = old.index_fill(-1, torch.tensor([0]), number)
        place[path[-1]] = changed.to(old.dtype) if choice.random() < 0.7 else changed
    else:
        other = choice.choice(_places(saved))
        value: Any = saved
        for key in other:
            value = value[key]
        place[path[-1]] = choice.choice([*values, copy.deepcopy(value)])
    return saved


def test_any_damage_is_refused_or_harmless() -> None:
    """A state damaged at random: an error and nothing changed, or training that stays sound."""
    good, choice, accepted, refused = state_dict(_trained()), random.Random(0), 0, 0
    for _ in range(300):
        saved = copy.deepcopy(good)
        for _ in range(choice.choice((1, 1, 2, 3))):
            saved = _damaged(saved, choice)
        model = _trained(1, steps=1)
        before = state_dict(model)
        try:
            load_state_dict(model, saved)
        except StateError:
            _assert_same_state(state_dict(model), before)
            refused += 1
            continue
        accepted += 1
        subspaces = [one for owner in model.parameters() for one in subspaces_of(owner).values()]
        for basis in _train(subspaces, range(5, 12)):
            assert basis.isfinite().all()
        assert all(map(_is_sound, subspaces))
        for owner in model.parameters():
            seed = rounding_seed_of(owner)
            assert seed is not None
            seed.begin_step()
    assert accepted > 20
    assert refused > 200
