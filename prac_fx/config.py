"""Options of the "prac" backend: one frozen dataclass, and the parser of `torch.compile(options=...)`."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from prac_fx.codecs import ELEMENTWISE
from prac_fx.errors import PracOptionError
from prac_fx.torch_compat import inductor_config, inductor_patches

PREFIX = "prac."

# How the saved values of each part may be stored. "auto" takes PRAC where it saves FLOPs and computes the
# value again from stored ones where that is free.
QUANTIZED = tuple(ELEMENTWISE)
PARTS: Mapping[str, tuple[str, ...]] = {
    "weight_gradient": ("auto", "prac", "recompute", *QUANTIZED, "exact"),
    "input_gradient": ("prac", *QUANTIZED, "exact"),
    "attention": (*QUANTIZED, "exact"),
    "query_key": (*QUANTIZED, "exact"),
    "coordinates": (*QUANTIZED, "exact"),
    "checkpoint_inputs": (*QUANTIZED, "exact"),
}
RULE_CODECS = ("prac", "recompute", *QUANTIZED, "exact")

# What each policy sets wherever the user sets nothing.
POLICIES: Mapping[str, Mapping[str, Any]] = {
    "linear": {
        "weight_gradient": "prac",
        "input_gradient": "exact",
        "attention": "exact",
        "query_key": "exact",
        "coordinates": "exact",
    },
    "balanced": {
        "weight_gradient": "auto",
        "input_gradient": "int8",
        "attention": "int8",
        "query_key": "int8",
        "coordinates": "int8",
    },
    "max": {
        "weight_gradient": "auto",
        "input_gradient": "int4",
        "attention": "int4",
        "query_key": "int8",
        "coordinates": "int4",
    },
    "paper": {
        "weight_gradient": "prac",
        "input_gradient": "prac",
        "attention": "exact",
        "query_key": "exact",
        "coordinates": "exact",
        "principal": {"weight_gradient": 0.3, "input_gradient": 0.2},
        "random": {"weight_gradient": 0.3, "input_gradient": 0.2},
        "blocks": 1,
        "refresh_every": 500,
    },
}
_COMMON: Mapping[str, Any] = {
    "principal": 0.3,
    "random": 0.3,
    "blocks": "auto",
    "refresh_every": 100,
    "checkpoint_inputs": "exact",
}

# Passes that can be left out; see `prac_fx.passes.runner`.
SKIPPABLE_PASSES = ("judge", "factor", "sample")

ProjectedRole = Literal["weight_gradient", "input_gradient"]
PROJECTED_ROLES: tuple[ProjectedRole, ...] = ("weight_gradient", "input_gradient")


@dataclass(frozen=True, kw_only=True)
class PracConfig:
    """Every setting of the backend; `prac.<field>` in `torch.compile(options=...)`.

    A field that is None takes what the policy sets; after construction it holds that. Where "one per role" is
    allowed, a mapping such as {"weight_gradient": 0.3, "input_gradient": 0.2} gives each role its own.

    Attributes:
        policy: "linear" (only what weight gradients alone read, by PRAC), "balanced" (the rest as int8),
            "max" (the rest as int4), "paper" (PRAC wherever the paper has it).
        weight_gradient: how a value is stored that only weight-gradient matmuls read. "auto" is PRAC where
            that saves FLOPs, else nothing where the value follows from stored ones without a matmul, else as
            `input_gradient` says.
        input_gradient: how a value is stored that the input-gradient path reads.
        attention: how value and result of attention are stored.
        query_key: how query and key of attention are stored. Backward takes the exponential of their product, so
            their errors weigh more than others': 4 bits there bias the gradients. What is also a value counts here.
        coordinates: how the coordinates of PRAC are stored.
        checkpoint_inputs: how a value is stored from which backward computes a checkpointed region again, or what
            `activation_memory_budget` has it compute again. "exact" by default. With a codec backward computes the
            region anew from the decoded value, matmuls and attention included, so that it differentiates the
            region at a point near the exact one: unbiased to first order in the rounding, and no more than that.
            A region that draws random numbers which depend on its input (dropout with
            `torch._inductor.config.fallback_random`) starts from the exact value.
        rules: (glob on module paths, codec) pairs, such as ("*.mlp.*", "int4"); the first match wins over the
            parts above.
        group_size: features that share one scale in the quantised codecs, at most.
        rounding: "stochastic" (unbiased) or "nearest", in the quantised codecs.
        zero_point: the quantised codecs store an offset beside each scale.
        principal: r1, directions of the principal basis, one number or one per role. A float is a fraction of
            the feature count n (floor, as in the paper, section 5.1), an int is a number of directions. 0
            gives RAC.
        random: r2, directions of the random tail basis, likewise. 0 gives PAC, which is biased.
        blocks: how many equal blocks of features have their own basis (P is block-diagonal). 1 is the
            paper's dense basis; "auto" takes the fewest blocks with which the factored gradients cost
            about the FLOPs of the exact ones at most and the state stays small beside what it saves.
            A number that does not divide the features, or exceeds a rank, counts as 1.
        refresh_every: T, training forward passes between two refreshes of a principal basis.
        tail_every: forward passes between two draws of a tail basis, one number or one per role; None means
            at each refresh.
        min_nbytes: values smaller than this many bytes are kept exact.
        include: globs on module paths; when not empty, only matching values are compressed.
        exclude: globs on module paths whose values are kept exact. It wins over `include`.
        seed: start of our own random stream; the user's is never touched.
        across_ranks: which processes of a distributed run draw the same random numbers. "auto": the data-parallel
            replicas of DistributedDataParallel and `fully_shard` draw independently, ranks that share data
            (tensor parallelism) alike. "identical": all of them alike. "independent": none of them; for data
            parallelism that neither of the two wrappers runs.
        skip_passes: names of passes to leave out, to find the one that a fault comes from: "judge" (values that backward may
            not read with an error are encoded all the same: gradients may be wrong), "factor" (weight gradients are
            taken from decoded values), "sample" (no rows are sampled, so that bases stay random).
        strict: raise where the backend would otherwise fall back to plain Inductor with a warning.
        report: path of a JSON file, into which the job writes what its compiled graphs save for backward, and why;
            `python -m prac_fx.report report.json` shows it. In a distributed job each rank writes its own,
            `report.rank0.json`. It changes nothing that is compiled, and `explain` does not read it.

    Raises:
        PracOptionError: on construction, naming the option, the value and what is allowed.
    """

    policy: Literal["linear", "balanced", "max", "paper"] = "balanced"
    weight_gradient: str | None = None
    input_gradient: str | None = None
    attention: str | None = None
    query_key: str | None = None
    coordinates: str | None = None
    checkpoint_inputs: str | None = None
    rules: tuple[tuple[str, str], ...] = ()
    group_size: int = 128
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    zero_point: bool = False
    principal: float | int | Mapping[str, float | int] | None = None
    random: float | int | Mapping[str, float | int] | None = None
    blocks: int | Literal["auto"] | None = None
    refresh_every: int | None = None
    tail_every: int | Mapping[str, int | None] | None = None
    min_nbytes: int = 64 * 1024
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    seed: int = 0
    across_ranks: Literal["auto", "identical", "independent"] = "auto"
    skip_passes: tuple[str, ...] = ()
    strict: bool = False
    report: str | None = None

    def __post_init__(self) -> None:
        _check_choice("policy", self.policy, tuple(POLICIES))
        for name, value in {**_COMMON, **POLICIES[self.policy]}.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for part, allowed in PARTS.items():
            _check_choice(part, getattr(self, part), allowed)
        object.__setattr__(self, "rules", _rules(self.rules))
        _check_int("group_size", self.group_size, minimum=8)
        _check_choice("rounding", self.rounding, ("stochastic", "nearest"))
        _check_choice("across_ranks", self.across_ranks, ("auto", "identical", "independent"))
        for name in ("zero_point", "strict"):
            if not isinstance(getattr(self, name), bool):
                raise PracOptionError(
                    f"{PREFIX}{name}={getattr(self, name)!r}: expected True or False"
                )
        for name in ("principal", "random", "tail_every"):
            object.__setattr__(self, name, _per_role(name, getattr(self, name)))
        self._check_projection()
        object.__setattr__(self, "report", _json_path("report", self.report))
        _check_int("min_nbytes", self.min_nbytes, minimum=0)
        _check_int("seed", self.seed, minimum=0, maximum=2**63 - 1)
        for name in ("include", "exclude"):
            object.__setattr__(self, name, _globs(name, getattr(self, name)))
        skipped = _globs("skip_passes", self.skip_passes)
        for name in skipped:
            _check_choice("skip_passes", name, SKIPPABLE_PASSES)
        object.__setattr__(self, "skip_passes", skipped)
        both = sorted(set(self.include) & set(self.exclude))
        if both:
            raise PracOptionError(
                f"prac.include and prac.exclude contradict each other: both have {both[0]!r}"
            )

    def _check_projection(self) -> None:
        """Ranks, blocks and schedule of PRAC."""
        if self.blocks != "auto":
            _check_int("blocks", self.blocks, minimum=1, alternative='"auto"')
        _check_int("refresh_every", self.refresh_every, minimum=1)
        for role in PROJECTED_ROLES:
            principal, random, tail = (
                self.for_role(name, role) for name in ("principal", "random", "tail_every")
            )
            _check_rank("principal", principal)
            _check_rank("random", random)
            _check_rank_sum(principal, random)
            if tail is None:
                continue
            _check_int("tail_every", tail, minimum=1, alternative="None")
            if tail > self.refresh_every:
                raise PracOptionError(
                    f"prac.tail_every={tail} contradicts prac.refresh_every="
                    f"{self.refresh_every}: a new principal basis needs a new tail, so tail_every is at "
                    "most refresh_every"
                )

    def for_role(self, name: str, role: ProjectedRole) -> Any:
        """The setting of one role, where one number or one per role is allowed."""
        value = getattr(self, name)
        return dict(value)[role] if isinstance(value, tuple) else value

    @property
    def is_biased(self) -> bool:
        """True when PRAC has no random part (PAC): its gradients are biased."""
        return any(self.for_role("random", role) == 0 for role in PROJECTED_ROLES)

    def cache_key(self) -> str:
        """Text that is equal exactly for configurations that compile alike."""
        return repr(dataclasses.replace(self, report=None))

    # not the generated ones: principal=1 is one direction and principal=1.0 all of them, yet 1 == 1.0
    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PracConfig):
            return NotImplemented
        return repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))


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


def read_options(
    options: Mapping[str, Any] | PracConfig | None,
) -> tuple[PracConfig, dict[str, Any]]:
    """Our configuration and Inductor's config patches, from options in either form.

    Raises:
        PracOptionError: as `split_options` and `config_patches`.
    """
    if isinstance(options, PracConfig):
        return options, {}
    config, inductor_options = split_options(options)
    return config, config_patches(None, inductor_options)


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


def _check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise PracOptionError(
            f"{PREFIX}{name}={value!r}: allowed are {', '.join(map(repr, allowed))}"
            f"{_near_miss(str(value), allowed)}"
        )


def _per_role(name: str, value: object) -> object:
    """One value as it is; one per role as pairs, which can be hashed."""
    if not isinstance(value, Mapping | tuple | list):
        return value
    try:
        given = dict(value)
    except (TypeError, ValueError):
        given = {}
    if set(given) != set(PROJECTED_ROLES):
        raise PracOptionError(
            f"{PREFIX}{name}={value!r}: expected one value, or a mapping with exactly the keys "
            f"{' and '.join(map(repr, PROJECTED_ROLES))}"
        )
    return tuple((role, given[role]) for role in PROJECTED_ROLES)


def _rules(value: object) -> tuple[tuple[str, str], ...]:
    expected = 'a list of (glob, codec) pairs, such as [("*.mlp.*", "int4")]'
    if not isinstance(value, list | tuple):
        raise PracOptionError(f"{PREFIX}rules={value!r}: expected {expected}")
    for rule in value:
        is_pair = isinstance(rule, list | tuple) and len(rule) == 2
        if not is_pair or not all(isinstance(part, str) and part for part in rule):
            raise PracOptionError(f"{PREFIX}rules: got {rule!r}, expected {expected}")
        if rule[1] not in RULE_CODECS:
            raise PracOptionError(
                f"{PREFIX}rules: unknown codec in {tuple(rule)!r}; allowed are "
                f"{', '.join(map(repr, RULE_CODECS))}{_near_miss(rule[1], RULE_CODECS)}"
            )
    return tuple((rule[0], rule[1]) for rule in value)


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


def _json_path(name: str, value: object) -> str | None:
    if value is None:
        return None
    path = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(path, str) or not path.endswith(".json"):
        raise PracOptionError(
            f"{PREFIX}{name}={value!r}: expected the path of a JSON file, such as 'report.json'"
        )
    return path


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
