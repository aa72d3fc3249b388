"""Options of the "prac" backend: one frozen dataclass, and the parser of `torch.compile(options=...)`."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from prac_fx.errors import PracOptionError
from prac_fx.torch_compat import inductor_config, inductor_patches

PREFIX = "prac."
POLICIES = ("linear",)


@dataclass(frozen=True, kw_only=True)
class PracConfig:
    """Every setting of the backend; `prac.<field>` in `torch.compile(options=...)`.

    Attributes:
        policy: which saved values are candidates. "linear": those that only weight-gradient matmuls read.
        principal: r1, directions of the principal basis. A float is a fraction of the feature count n
            (floor, as in the paper, section 5.1), an int is a number of directions. 0 gives RAC.
        random: r2, directions of the random tail basis, likewise. 0 gives PAC, which is biased.
        blocks: how many equal blocks of features have their own basis (P is block-diagonal). 1 is the
            paper's dense basis; "auto" takes the fewest blocks with which the factored gradients cost
            about the FLOPs of the exact ones at most and the state stays small beside what it saves.
            A number that does not divide the features, or exceeds a rank, counts as 1.
        refresh_every: T, training forward passes between two refreshes of a principal basis.
        tail_every: forward passes between two draws of a tail basis; None means at each refresh.
        min_nbytes: values smaller than this many bytes are kept exact.
        include: globs on module paths; when not empty, only matching values are compressed.
        exclude: globs on module paths whose values are kept exact. It wins over `include`.
        seed: start of our own random stream; the user's is never touched.
        strict: raise where the backend would otherwise fall back to plain Inductor with a warning.

    Raises:
        PracOptionError: on construction, naming the option, the value and what is allowed.
    """

    policy: Literal["linear"] = "linear"
    principal: float | int = 0.3
    random: float | int = 0.3
    blocks: int | Literal["auto"] = "auto"
    refresh_every: int = 100
    tail_every: int | None = None
    min_nbytes: int = 64 * 1024
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    seed: int = 0
    strict: bool = False

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise PracOptionError(
                f"prac.policy={self.policy!r}: allowed are {', '.join(map(repr, POLICIES))}"
                f"{_near_miss(str(self.policy), POLICIES)}"
            )
        for name in ("principal", "random"):
            _check_rank(name, getattr(self, name))
        _check_rank_sum(self.principal, self.random)
        if self.blocks != "auto":
            _check_int("blocks", self.blocks, minimum=1, alternative='"auto"')
        _check_int("refresh_every", self.refresh_every, minimum=1)
        if self.tail_every is not None:
            _check_int("tail_every", self.tail_every, minimum=1, alternative="None")
            if self.tail_every > self.refresh_every:
                raise PracOptionError(
                    f"prac.tail_every={self.tail_every} contradicts prac.refresh_every="
                    f"{self.refresh_every}: a new principal basis needs a new tail, so tail_every is at "
                    "most refresh_every"
                )
        _check_int("min_nbytes", self.min_nbytes, minimum=0)
        _check_int("seed", self.seed, minimum=0, maximum=2**63 - 1)
        if not isinstance(self.strict, bool):
            raise PracOptionError(f"prac.strict={self.strict!r}: expected True or False")
        for name in ("include", "exclude"):
            object.__setattr__(self, name, _globs(name, getattr(self, name)))
        both = sorted(set(self.include) & set(self.exclude))
        if both:
            raise PracOptionError(
                f"prac.include and prac.exclude contradict each other: both have {both[0]!r}"
            )

    @property
    def is_biased(self) -> bool:
        """True when the estimator has no random part (PAC): its gradients are biased."""
        return self.random == 0

    def cache_key(self) -> str:
        """Text that is equal exactly for equal configurations."""
        return repr(self)

    # not the generated ones: principal=1 is one direction and principal=1.0 all of them, yet 1 == 1.0
    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PracConfig):
            return NotImplemented
        return self.cache_key() == other.cache_key()

    def __hash__(self) -> int:
        return hash(self.cache_key())


def split_options(options: Mapping[str, Any] | None) -> tuple[PracConfig, dict[str, Any]]:
    """Split the `options` of `torch.compile` into our configuration and Inductor's.

    Returns:
        The configuration from the `prac.*` keys, and the remaining keys, checked against Inductor's.

    Raises:
        PracOptionError: unknown key (with the nearest known one), ill-typed or contradictory value.
    """
    fields = {field.name for field in dataclasses.fields(PracConfig)}
    ours: dict[str, Any] = {}
    inductor: dict[str, Any] = {}
    for key, value in (options or {}).items():
        if not isinstance(key, str):
            raise PracOptionError(f"options: keys are text, got {key!r}")
        name = key.replace("-", "_")
        if name.startswith(PREFIX):
            field = name[len(PREFIX) :]
            if field not in fields:
                known = sorted(PREFIX + known for known in fields)
                raise PracOptionError(
                    f"unknown option {key!r}{_near_miss(name, known)}; known are {', '.join(known)}"
                )
            ours[field] = value
        else:
            inductor[_inductor_key(key, name, fields)] = value
    return PracConfig(**ours), inductor


def config_patches(mode: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Inductor's config patches for a mode and for options that `split_options` has checked.

    Raises:
        PracOptionError: unknown mode, or a value of the wrong type.
    """
    try:
        return inductor_patches(mode, options)
    except RuntimeError as error:
        raise PracOptionError(f"options: {error}") from None


def _inductor_key(key: str, name: str, fields: set[str]) -> str:
    known = inductor_config.get_config_copy()
    if name == "custom_partitioner_fn":
        raise PracOptionError(
            'options: "custom_partitioner_fn" contradicts backend="prac", which is a partitioner itself'
        )
    if name not in known:
        if name in fields or name == "prac":
            raise PracOptionError(f"unknown option {key!r}: did you mean {PREFIX + name!r}?")
        raise PracOptionError(
            f"unknown option {key!r}: neither a prac.* option nor one of Inductor's"
            f"{_near_miss(name, [*known, *(PREFIX + field for field in fields)])}"
        )
    return name


def _near_miss(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _check_int(
    name: str,
    value: object,
    *,
    minimum: int,
    maximum: int | None = None,
    alternative: str | None = None,
) -> None:
    allowed = (
        f"an int of at least {minimum}" if maximum is None else f"an int in {minimum}..{maximum}"
    )
    if alternative:
        allowed += f", or {alternative}"
    # bool is an int in Python, and never what is meant here
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= minimum
    if not ok or (maximum is not None and value > maximum):  # type: ignore[operator]
        raise PracOptionError(f"{PREFIX}{name}={value!r}: expected {allowed}")


def _check_rank(name: str, value: object) -> None:
    allowed = (
        "a fraction of the features in 0.0 .. 1.0 or a whole number of directions (int, at least 0)"
    )
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PracOptionError(f"{PREFIX}{name}={value!r}: expected {allowed}")
    if value < 0 or value != value or (isinstance(value, float) and value > 1.0):
        raise PracOptionError(f"{PREFIX}{name}={value!r}: expected {allowed}")


def _check_rank_sum(principal: float, random: float) -> None:
    both = f"prac.principal={principal!r} and prac.random={random!r}"
    if principal == 0 and random == 0:
        raise PracOptionError(f"{both}: at least one of them must be above 0")
    if isinstance(principal, float) and isinstance(random, float) and principal + random > 1.0:
        raise PracOptionError(f"{both}: together they are more than all directions (1.0)")


def _globs(name: str, value: object) -> tuple[str, ...]:
    patterns = [value] if isinstance(value, str) else value
    if not isinstance(patterns, list | tuple) or not all(
        isinstance(p, str) and p for p in patterns
    ):
        raise PracOptionError(
            f"{PREFIX}{name}={value!r}: expected a glob on module paths or a list of them, "
            'such as ["*.mlp.*"]'
        )
    return tuple(patterns)
