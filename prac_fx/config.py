"""Options of the "prac" backend: a frozen dataclass."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from prac_fx.codecs import ELEMENTWISE, OF_WEIGHT_GRADIENTS
from prac_fx.errors import PracOptionError
from prac_fx.option_checks import (
    PREFIX,
    check_choice,
    check_int,
    check_rank,
    check_rank_sum,
    check_share,
    globs,
    json_path,
    per_role,
    rules,
)

# How the saved values of each part may be stored. "auto" takes PRAC where it saves FLOPs. It
# computes the value again from stored values where that is free.
QUANTIZED = tuple(ELEMENTWISE)
SAMPLED = tuple(OF_WEIGHT_GRADIENTS)
PARTS: Mapping[str, tuple[str, ...]] = {
    "weight_gradient": ("auto", "prac", *SAMPLED, "recompute", *QUANTIZED, "exact"),
    "input_gradient": ("prac", *QUANTIZED, "exact"),
    "attention": (*QUANTIZED, "exact"),
    "query_key": (*QUANTIZED, "exact"),
    "coordinates": (*QUANTIZED, "exact"),
    "checkpoint_inputs": (*QUANTIZED, "exact"),
}
RULE_CODECS = ("prac", *SAMPLED, "recompute", *QUANTIZED, "exact")

# What each policy sets wherever the user sets nothing.
POLICIES: Mapping[str, Mapping[str, Any]] = {
    "exact": {
        "weight_gradient": "recompute",
        "input_gradient": "exact",
        "attention": "exact",
        "query_key": "exact",
        "coordinates": "exact",
    },
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
SKIPPABLE_PASSES = ("judge", "factor", "sample", "tabulate")

ProjectedRole = Literal["weight_gradient", "input_gradient"]
PROJECTED_ROLES: tuple[ProjectedRole, ...] = ("weight_gradient", "input_gradient")


@dataclass(frozen=True, kw_only=True)
class PracConfig:
    """Every setting of the backend; `prac.<field>` in `torch.compile(options=...)`.

    A field that is None takes what the policy sets, and holds it after construction. Where a
    setting may be "one per role", a mapping gives each role its own:
    `{"weight_gradient": 0.3, "input_gradient": 0.2}`.

    Attributes:
        policy: Sets how values are stored wherever no other option says so. "exact" stores nothing
            with an error: it leaves out what follows from other stored values without a matmul.
            "linear" stores what only weight gradients read by PRAC, and keeps the rest exact.
            "balanced" stores the rest as int8, "max" stores it as int4. "paper" uses PRAC wherever
            the paper does.
        weight_gradient: How to store a value that only weight-gradient matmuls read (role W).
            "auto" tries three ways in turn. It takes PRAC where that leaves at most 0.85 of the
            FLOPs and there are 32 features or more. On a GPU of known speed it has to leave at most
            0.95 of the estimated time, too. It stores nothing where the value follows from stored
            ones without a matmul. Else it does what `input_gradient` says. "sampled" keeps some of
            the tokens (`sampled`), the largest and a random part of the others, and makes unbiased
            weight gradients of these alone (WTA-CRS, arXiv 2305.15265). "pamm" stores each token as
            its projection on one of few tokens that are drawn in each step (PAMM, arXiv
            2506.02939). It is biased and warns once.
        input_gradient: How to store a value that the input-gradient path reads (role A).
        attention: How to store the value and the result of attention.
        query_key: How to store the query and the key of attention. Backward takes the exponential
            of their product, so their errors weigh more than others': 4 bits there bias the
            gradients. A query or key that is also a value counts here.
        coordinates: How to store the coordinates of PRAC.
        checkpoint_inputs: How to store a value that backward computes a checkpointed region from,
            or that `activation_memory_budget` computes other values from. "exact" keeps it as it
            is. With a codec backward computes the region from the decoded value, matmuls and
            attention included. It then differentiates the region at a point near the exact one. The
            gradient is unbiased to first order in the rounding, and no more than that. A region
            that draws random numbers which depend on its input (dropout with
            `torch._inductor.config.fallback_random`) starts from the exact value.
        rules: How to store values of single modules: pairs of a glob on module paths and a codec,
            such as `("*.mlp.*", "int4")`. The first pair that matches wins over the parts above.
            Paths are relative to the compiled module.
        sampled: The share of the tokens that "sampled" keeps, a float above 0.0 and at most 1.0.
            Bytes and FLOPs shrink to it.
        pamm: The share of the tokens that "pamm" draws, for all tokens to stand on, a float above
            0.0 and at most 1.0.
        group_size: The largest number of features that share one scale in the quantised codecs.
        rounding: How the quantised codecs round. "stochastic" is unbiased, "nearest" is biased.
        zero_point: Whether the quantised codecs store an offset beside each scale.
        principal: The number of principal directions, r1; one number or one per role. A float is a
            fraction of the feature count n (rounded down, as in the paper, section 5.1). An int is
            a number of directions. 0 gives RAC: unbiased, and noisier.
        random: The number of random directions, r2; one number or one per role. Floats and ints
            count as in `principal`. 0 gives PAC, which is biased and warns once.
        blocks: The number of equal blocks of features that have a basis each (P is block-diagonal).
            More blocks cost less and add noise. 1 is the paper's dense basis. "auto" takes the
            fewest blocks with which the factored gradients cost at most about the FLOPs of the
            exact ones, and the state stays small beside what it saves. A number that does not
            divide the features, or exceeds a rank, counts as 1.
        refresh_every: The number of training forward passes between two refreshes of a principal
            basis. The interval starts at 1 and doubles until it is this number.
        tail_every: The number of forward passes between two draws of a random basis; one number or
            one per role. None draws one at each refresh.
        min_nbytes: Values smaller than this many bytes stay exact.
        include: Only values that match one of these globs on module paths are compressed, such as
            `["*.mlp.*"]`. A pattern matches the module that makes a value and each module that
            reads it.
        exclude: Values that match one of these globs on module paths stay exact. It wins over
            `include`.
        seed: Where our own random stream starts. The same seed gives the same bits. The user's
            random stream is never touched.
        across_ranks: Which processes of a distributed run draw the same random numbers. With "auto"
            the data-parallel replicas of DistributedDataParallel and `fully_shard` draw
            independently, and ranks that share data (tensor parallelism) draw alike. With
            "identical" all ranks draw alike. With "independent" all draw independently; it is for
            data parallelism that neither of the two wrappers runs.
        skip_passes: Passes to leave out, to find the one that a fault comes from. Without "judge" a
            value is encoded even if backward may not read it with an error, so gradients may be
            wrong. Without "factor" weight gradients are taken from decoded values. Without "sample"
            no rows are sampled, so bases stay random. Without "tabulate" each kernel on a
            GPU computes the cosines of a rotary embedding, or the like, anew.
        strict: Whether to raise an error where the backend would fall back to plain Inductor with a
            warning, and after the first step of an optimizer if nothing is compressed.
        report: Path of a JSON file that the running job writes its report into. The report says
            what the compiled graphs save for backward, and why.
            `python -m prac_fx.report report.json` shows it. In a distributed job each rank writes
            its own, `report.rank0.json`. It changes nothing that is compiled, and `explain` does
            not read it.

    Raises:
        PracOptionError: on construction, naming the option, the value and what is allowed.
    """

    policy: Literal["exact", "linear", "balanced", "max", "paper"] = "balanced"
    weight_gradient: str | None = None
    input_gradient: str | None = None
    attention: str | None = None
    query_key: str | None = None
    coordinates: str | None = None
    checkpoint_inputs: str | None = None
    rules: tuple[tuple[str, str], ...] = ()
    sampled: float = 0.25
    pamm: float = 0.002
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
        check_choice("policy", self.policy, tuple(POLICIES))
        for name, value in {**_COMMON, **POLICIES[self.policy]}.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for part, allowed in PARTS.items():
            check_choice(part, getattr(self, part), allowed)
        object.__setattr__(self, "rules", rules(self.rules, RULE_CODECS))
        for name in SAMPLED:
            check_share(name, getattr(self, name))
        check_int("group_size", self.group_size, minimum=8)
        check_choice("rounding", self.rounding, ("stochastic", "nearest"))
        check_choice("across_ranks", self.across_ranks, ("auto", "identical", "independent"))
        for name in ("zero_point", "strict"):
            if not isinstance(getattr(self, name), bool):
                raise PracOptionError(
                    f"{PREFIX}{name}={getattr(self, name)!r}: expected True or False"
                )
        for name in ("principal", "random", "tail_every"):
            object.__setattr__(self, name, per_role(name, getattr(self, name), PROJECTED_ROLES))
        self._check_projection()
        object.__setattr__(self, "report", json_path("report", self.report))
        check_int("min_nbytes", self.min_nbytes, minimum=0)
        check_int("seed", self.seed, minimum=0, maximum=2**63 - 1)
        for name in ("include", "exclude"):
            object.__setattr__(self, name, globs(name, getattr(self, name)))
        skipped = globs("skip_passes", self.skip_passes)
        for name in skipped:
            check_choice("skip_passes", name, SKIPPABLE_PASSES)
        object.__setattr__(self, "skip_passes", skipped)
        self._check_sampling()
        both = sorted(set(self.include) & set(self.exclude))
        if both:
            raise PracOptionError(
                f"prac.include and prac.exclude contradict each other: both have {both[0]!r}"
            )

    def _check_sampling(self) -> None:
        """Sampled rows cannot be decoded, which is what happens to them without `factor`."""
        undecodable = [codec for codec in self._of_weight_gradients if codec in SAMPLED]
        if undecodable and "factor" in self.skip_passes:
            raise PracOptionError(
                f"prac.skip_passes={self.skip_passes!r} contradicts the codec {undecodable[0]!r}: "
                'weight gradients are made from its rows by the pass "factor"'
            )

    @property
    def _of_weight_gradients(self) -> tuple[str, ...]:
        """The codecs that values of role W may have."""
        assert self.weight_gradient is not None
        return (self.weight_gradient, *(codec for _, codec in self.rules))

    def _check_projection(self) -> None:
        """Ranks, blocks and schedule of PRAC."""
        if self.blocks != "auto":
            check_int("blocks", self.blocks, minimum=1, alternative='"auto"')
        check_int("refresh_every", self.refresh_every, minimum=1)
        for role in PROJECTED_ROLES:
            principal, random, tail = (
                self.for_role(name, role) for name in ("principal", "random", "tail_every")
            )
            check_rank("principal", principal)
            check_rank("random", random)
            check_rank_sum(principal, random)
            if tail is None:
                continue
            check_int("tail_every", tail, minimum=1, alternative="None")
            if tail > self.refresh_every:
                raise PracOptionError(
                    f"prac.tail_every={tail} contradicts prac.refresh_every="
                    f"{self.refresh_every}: a new principal basis needs a new tail, so tail_every "
                    "is at most refresh_every"
                )

    def for_role(self, name: str, role: ProjectedRole) -> Any:
        """The setting of one role, where one number or one per role is allowed."""
        value = getattr(self, name)
        return dict(value)[role] if isinstance(value, tuple) else value

    @property
    def is_biased(self) -> bool:
        """Has PRAC no random part (PAC), so that its gradients are biased?"""
        has_no_tail = any(self.for_role("random", role) == 0 for role in PROJECTED_ROLES)
        return has_no_tail and not self.is_exact

    @property
    def uses_pamm(self) -> bool:
        """May weight gradients be made by PAMM, which is biased?"""
        return "pamm" in self._of_weight_gradients

    @property
    def is_exact(self) -> bool:
        """Is nothing stored with an error?"""
        stored = [getattr(self, part) for part in PARTS if part != "coordinates"]
        return {*stored, *(codec for _, codec in self.rules)} <= {"exact", "recompute"}

    def made_exact(self) -> PracConfig:
        """The same, with nothing stored with an error."""
        changes = {"policy": "exact", "rules": (), "checkpoint_inputs": "exact"}
        return dataclasses.replace(self, **{**changes, **POLICIES["exact"]})

    def cache_key(self) -> str:
        """Text that is the same for two configurations if and only if they compile alike."""
        return repr(dataclasses.replace(self, report=None))

    # not the generated methods, because 1 == 1.0: principal=1 is a single direction, and
    # principal=1.0 is all of them
    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PracConfig):
            return NotImplemented
        return repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))
