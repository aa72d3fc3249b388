"""Options: what is accepted, what is refused, and that a refusal says what to write instead."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.fx as fx
from torch import nn

import prac_fx
from prac_fx import PracConfig, PracError, PracOptionError, PracWarning
from prac_fx.compiler import dynamo_backend
from prac_fx.compiler.dynamo_backend import PracBackend, prac
from prac_fx.config import PARTS, POLICIES
from prac_fx.options import split_options
from prac_fx.torch_compat import inductor_config

NAN, INFINITY = float("nan"), float("inf")
# for calls that a type checker would refuse
UNTYPED: Any = PracConfig
FIELDS = [field.name for field in dataclasses.fields(PracConfig)]

RANK = "a fraction of the features in 0.0 .. 1.0 or a whole number of directions (int, at least 0)"
GLOBS = "a glob on module paths or a list of them"
POSITIVE = "an int of at least 1"
SHARE = "a float above 0.0 and at most 1.0"

# -- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("policy", policy) for policy in POLICIES),
        *((part, codec) for part, codecs in PARTS.items() for codec in codecs),
        ("rules", ()),
        ("rules", (("*.mlp.*", "int4"), ("*", "exact"))),
        ("pamm", 0.001),
        ("sampled", 0.01),
        ("sampled", 1.0),
        ("group_size", 8),
        ("group_size", 1024),
        ("rounding", "stochastic"),
        ("rounding", "nearest"),
        ("zero_point", True),
        ("zero_point", False),
        ("principal", 0.0),
        ("principal", 0),
        ("principal", 0.7),
        ("principal", 1),
        ("principal", 4096),
        ("random", 0.0),
        ("random", 0),
        ("random", 0.7),
        ("random", 32),
        ("blocks", "auto"),
        ("blocks", 1),
        ("blocks", 7),
        ("refresh_every", 1),
        ("refresh_every", 10_000),
        ("tail_every", None),
        ("tail_every", 1),
        ("tail_every", 50),
        ("min_nbytes", 0),
        ("min_nbytes", 2**40),
        ("seed", 0),
        ("seed", 2**63 - 1),
        *(("across_ranks", choice) for choice in ("auto", "identical", "independent")),
        ("strict", True),
        ("strict", False),
        ("report", None),
        ("report", "runs/report.json"),
    ],
)
def test_accepted_values(field: str, value: Any) -> None:
    config, inductor = split_options({f"prac.{field}": value})
    assert getattr(config, field) == value
    assert type(getattr(config, field)) is type(value)
    assert config == PracConfig(**{field: value})
    assert inductor == {}


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("policy", "linera", "'linear'"),
        ("policy", None, "'linear'"),
        ("weight_gradient", "in8", "'int8'"),
        ("weight_gradient", 8, "'prac'"),
        ("input_gradient", "auto", "'int8'"),
        ("input_gradient", ["int8"], "'int8'"),
        ("attention", "prac", "'int8'"),
        ("attention", "fp8_e4m3", "'int8', 'int4', 'exact'"),
        ("coordinates", "prac", "'int8'"),
        *(("sampled", bad, SHARE) for bad in (0.0, -0.1, 1.01, NAN, INFINITY, 1, True, "0.3")),
        *(("pamm", bad, SHARE) for bad in (0.0, 64)),
        ("group_size", 4, "an int of at least 8"),
        ("group_size", 64.0, "an int of at least 8"),
        ("rounding", "random", "'stochastic', 'nearest'"),
        ("zero_point", 1, "True or False"),
        ("report", "report.html", "the path of a JSON file"),
        ("report", True, "the path of a JSON file"),
        ("report", b"report.json", "the path of a JSON file"),
        ("rules", "*.mlp.*", "a list of (glob, codec) pairs"),
        ("rules", {"*.mlp.*": "int4"}, "a list of (glob, codec) pairs"),
        ("principal", (0.3, 0.3), "a mapping with exactly the keys"),
        ("principal", {"weight_gradient": 0.3}, "a mapping with exactly the keys"),
        ("tail_every", {"W": 1, "A": 2}, "a mapping with exactly the keys"),
        ("policy", ["linear"], "'linear'"),
        ("principal", -0.1, RANK),
        ("principal", -1, RANK),
        ("principal", 1.5, RANK),
        ("principal", 32.0, RANK),
        ("principal", NAN, RANK),
        ("principal", INFINITY, RANK),
        ("principal", True, RANK),
        ("principal", "0.3", RANK),
        ("principal", 0.3j, RANK),
        ("random", -0.1, RANK),
        ("random", -32, RANK),
        ("random", 1.01, RANK),
        ("random", NAN, RANK),
        ("random", False, RANK),
        ("random", "half", RANK),
        ("blocks", 0, f'{POSITIVE}, or "auto"'),
        ("blocks", -2, f'{POSITIVE}, or "auto"'),
        ("blocks", 2.0, f'{POSITIVE}, or "auto"'),
        ("blocks", True, f'{POSITIVE}, or "auto"'),
        ("blocks", "automatic", f'{POSITIVE}, or "auto"'),
        ("refresh_every", 0, POSITIVE),
        ("refresh_every", -50, POSITIVE),
        ("refresh_every", 50.0, POSITIVE),
        ("refresh_every", True, POSITIVE),
        ("refresh_every", "50", POSITIVE),
        ("tail_every", 0, f"{POSITIVE}, or None"),
        ("tail_every", 2.5, f"{POSITIVE}, or None"),
        ("tail_every", True, f"{POSITIVE}, or None"),
        ("tail_every", NAN, f"{POSITIVE}, or None"),
        ("min_nbytes", -1, "an int of at least 0"),
        ("min_nbytes", 64e3, "an int of at least 0"),
        ("min_nbytes", False, "an int of at least 0"),
        ("min_nbytes", "64KiB", "an int of at least 0"),
        ("include", 3, GLOBS),
        ("include", None, GLOBS),
        ("include", "", GLOBS),
        ("include", [1], GLOBS),
        ("include", ["*.mlp.*", ""], GLOBS),
        ("include", {"*.mlp.*"}, GLOBS),
        ("exclude", 3, GLOBS),
        ("exclude", [None], GLOBS),
        ("exclude", {"*.mlp.*": True}, GLOBS),
        ("seed", -1, "an int in 0..9223372036854775807"),
        ("seed", 2**63, "an int in 0..9223372036854775807"),
        ("seed", True, "an int in 0..9223372036854775807"),
        ("seed", 0.0, "an int in 0..9223372036854775807"),
        ("across_ranks", "same", "allowed are 'auto', 'identical', 'independent'"),
        ("strict", 1, "True or False"),
        ("strict", 0, "True or False"),
        ("strict", None, "True or False"),
        ("strict", "yes", "True or False"),
    ],
)
def test_refused_values_name_the_key_the_value_and_what_is_allowed(
    field: str, value: Any, allowed: str
) -> None:
    for make in (
        lambda: PracConfig(**{field: value}),
        lambda: split_options({f"prac.{field}": value}),
    ):
        with pytest.raises(PracOptionError) as caught:
            make()
        message = str(caught.value)
        assert f"prac.{field}={value!r}" in message
        assert allowed in message
        assert "\n" not in message


def test_a_policy_near_miss_is_suggested() -> None:
    with pytest.raises(PracOptionError, match=r"did you mean 'linear'\?"):
        UNTYPED(policy="linaer")


def test_numpy_numbers_are_not_taken_for_ints() -> None:
    # they would end up in the cache key under another name
    with pytest.raises(PracOptionError, match=r"prac\.seed"):
        UNTYPED(seed=np.int64(3))


# -- contradictions -------------------------------------------------------------------------------


def test_fractions_sum_to_at_most_all_directions() -> None:
    PracConfig(principal=0.5, random=0.5)
    PracConfig(principal=1.0, random=0)
    with pytest.raises(PracOptionError) as caught:
        PracConfig(principal=0.7, random=0.4)
    for part in ("prac.principal=0.7", "prac.random=0.4", "more than all directions (1.0)"):
        assert part in str(caught.value)


def test_a_count_and_a_fraction_are_not_added() -> None:
    # the number of features is not known yet; a value too narrow is kept, and the report says so
    config = PracConfig(principal=500, random=0.9)
    assert (config.principal, config.random) == (500, 0.9)


@pytest.mark.parametrize("zero", [0, 0.0])
def test_one_of_the_ranks_is_above_zero(zero: float) -> None:
    with pytest.raises(PracOptionError, match="at least one of them must be above 0") as caught:
        PracConfig(principal=zero, random=zero)
    assert f"prac.principal={zero!r} and prac.random={zero!r}" in str(caught.value)


def test_the_tail_is_at_least_as_fresh_as_the_principal_basis() -> None:
    PracConfig(refresh_every=10, tail_every=10)
    with pytest.raises(PracOptionError) as caught:
        PracConfig(refresh_every=10, tail_every=11)
    message = str(caught.value)
    assert "prac.tail_every=11 contradicts prac.refresh_every=10" in message
    assert "at most refresh_every" in message


@pytest.mark.parametrize("codec", ["sampled", "pamm"])
def test_what_is_not_decoded_needs_the_pass_that_reads_it(codec: str) -> None:
    for options in ({"weight_gradient": codec}, {"rules": (("*", codec),)}):
        UNTYPED(skip_passes=("judge",), **options)
        with pytest.raises(PracOptionError, match=rf"skip_passes=.* contradicts .*'{codec}'"):
            UNTYPED(skip_passes=("factor",), **options)
        assert UNTYPED(**options).uses_pamm == (codec == "pamm")


@pytest.mark.parametrize("given", ["*.mlp.*", ["*.mlp.*"], ("*.mlp.*",)])
@pytest.mark.parametrize("field", ["include", "exclude"])
def test_globs_are_one_or_several(field: str, given: Any) -> None:
    config, _ = split_options({f"prac.{field}": given})
    assert getattr(config, field) == ("*.mlp.*",)
    assert hash(config) == hash(UNTYPED(**{field: "*.mlp.*"}))


def test_globs_keep_their_order() -> None:
    assert UNTYPED(include=["b", "a"]).include == ("b", "a")
    assert UNTYPED(include=[]) == PracConfig()


def test_the_same_glob_cannot_be_included_and_excluded() -> None:
    PracConfig(include=("*.mlp.*",), exclude=("*.mlp.down_proj",))
    with pytest.raises(PracOptionError) as caught:
        split_options({"prac.include": ["a", "*.mlp.*"], "prac.exclude": "*.mlp.*"})
    message = str(caught.value)
    assert "prac.include and prac.exclude" in message
    assert "'*.mlp.*'" in message


# -- keys -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("prac.principle", "prac.principal"),
        ("prac.refresh-evry", "prac.refresh_every"),
        ("prac.Seed", "prac.seed"),
        ("prac.minbytes", "prac.min_nbytes"),
        ("pricipal", "prac.principal"),
        ("principal", "prac.principal"),
        ("refresh-every", "prac.refresh_every"),
        ("prac_principal", "prac.principal"),
        ("pracprincipal", "prac.principal"),
        ("max_autotunee", "max_autotune"),
        ("shape-pading", "shape_padding"),
        ("triton.cudagraph", "triton.cudagraphs"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(key: str, suggestion: str) -> None:
    with pytest.raises(PracOptionError) as caught:
        split_options({key: 1})
    message = str(caught.value)
    assert repr(key) in message
    assert f"did you mean {suggestion!r}?" in message


def test_an_unknown_prac_key_lists_all_keys() -> None:
    with pytest.raises(PracOptionError) as caught:
        split_options({"prac.zzzzzz": 1})
    message = str(caught.value)
    assert "did you mean" not in message
    for field in FIELDS:
        assert f"prac.{field}" in message


def test_an_unknown_key_without_a_near_one_suggests_nothing() -> None:
    with pytest.raises(PracOptionError, match=r"neither a prac\.\* option nor one of Inductor's$"):
        split_options({"zzzzzz": 1})


def test_a_key_that_is_not_text_is_refused() -> None:
    with pytest.raises(PracOptionError, match="keys are text, got 3"):
        split_options({3: 1})  # type: ignore[dict-item]


def test_dashes_in_keys_equal_underscores() -> None:
    dashed = split_options(
        {"prac.refresh-every": 7, "prac.min-nbytes": 0, "epilogue-fusion": False}
    )
    plain = split_options({"prac.refresh_every": 7, "prac.min_nbytes": 0, "epilogue_fusion": False})
    assert (
        dashed == plain == (PracConfig(refresh_every=7, min_nbytes=0), {"epilogue_fusion": False})
    )


def test_inductor_keys_pass_through() -> None:
    inductor = {"max_autotune": True, "triton.cudagraphs": False, "shape_padding": True}
    config, rest = split_options({**inductor, "prac.seed": 3})
    assert config == PracConfig(seed=3)
    assert rest == inductor


@pytest.mark.parametrize("options", [None, {}])
def test_no_options_are_the_defaults(options: Any) -> None:
    assert split_options(options) == (PracConfig(), {})


def test_another_partitioner_is_refused() -> None:
    for key in ("custom_partitioner_fn", "custom-partitioner-fn"):
        with pytest.raises(PracOptionError, match="partitioner itself"):
            split_options({key: None})


# -- the dataclass --------------------------------------------------------------------------------

CHANGES: dict[str, Any] = {
    "policy": "linear",
    "weight_gradient": "int8",
    "input_gradient": "int4",
    "attention": "exact",
    "query_key": "exact",
    "coordinates": "exact",
    "checkpoint_inputs": "int8",
    "rules": (("*.mlp.*", "int4"),),
    "sampled": 0.5,
    "pamm": 0.01,
    "group_size": 64,
    "rounding": "nearest",
    "zero_point": True,
    "principal": 0.2,
    "random": 0.2,
    "blocks": 2,
    "refresh_every": 49,
    "tail_every": 49,
    "min_nbytes": 0,
    "include": ("*.mlp.*",),
    "exclude": ("*.mlp.*",),
    "seed": 1,
    "across_ranks": "identical",
    "skip_passes": ("factor",),
    "strict": True,
    "report": "report.json",
}


def test_config_is_frozen_and_keyword_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PracConfig().seed = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        UNTYPED("linear")


def test_equal_configurations_have_equal_hashes_and_keys() -> None:
    one, other = PracConfig(**CHANGES | {"exclude": ()}), PracConfig(**CHANGES | {"exclude": ()})
    assert one == other
    assert hash(one) == hash(other)
    assert one.cache_key() == other.cache_key()
    assert one != object()


def test_every_field_is_in_the_cache_key() -> None:
    assert set(CHANGES) == set(FIELDS)  # the list above must grow with the fields
    changed = [PracConfig(), *(PracConfig(**{name: value}) for name, value in CHANGES.items())]
    assert len(set(changed)) == len(changed)
    # where a job writes its report changes nothing that is compiled
    assert PracConfig(report="report.json").cache_key() == PracConfig().cache_key()
    keys = {config.cache_key() for config in changed if config.report is None}
    assert len(keys) == len(changed) - 1


def test_one_direction_is_not_all_directions() -> None:
    # 1 == 1.0, but as ranks they mean one direction and all of them
    one, every = PracConfig(principal=1, random=0), PracConfig(principal=1.0, random=0)
    assert one != every
    assert one.cache_key() != every.cache_key()
    assert prac_fx.backend(one) != prac_fx.backend(every)


def test_biased_is_without_random_part() -> None:
    assert PracConfig(random=0).is_biased
    assert PracConfig(random=0.0).is_biased
    assert not PracConfig(principal=0).is_biased
    assert not PracConfig().is_biased


# -- the backend object ---------------------------------------------------------------------------


def test_equal_backends_are_equal() -> None:
    assert prac_fx.backend() == prac_fx.backend(PracConfig())
    assert hash(prac_fx.backend()) == hash(prac_fx.backend(PracConfig()))
    assert prac_fx.backend(PracConfig(seed=1)) != prac_fx.backend(PracConfig())


def test_the_backend_is_called_prac() -> None:
    assert prac_fx.backend().__name__ == "prac"


@pytest.mark.parametrize("config", ["x", 0.3, {"principal": 0.3}, PracConfig])
def test_a_backend_takes_a_config_only(config: Any) -> None:
    with pytest.raises(PracOptionError, match="expected a PracConfig, got") as caught:
        prac_fx.backend(config)
    assert repr(config) in str(caught.value)


# tracing it would be an AttributeError
NO_GRAPH: Any = None


def test_the_typed_backend_takes_no_prac_options() -> None:
    with pytest.raises(PracOptionError, match=r"'prac\.seed' contradicts the PracConfig"):
        PracBackend(PracConfig())(NO_GRAPH, [], options={"prac.seed": 1})


@pytest.mark.parametrize(
    "options",
    [
        {"max_autotune": 3},
        {"max_autotune": "yes"},
        {"triton.cudagraphs": "yes"},
        {"shape_padding": None},
    ],
)
def test_an_inductor_option_of_the_wrong_type_is_refused_before_tracing(options: Any) -> None:
    (name,) = options
    for call in (prac, PracBackend(PracConfig())):
        with pytest.raises(PracOptionError, match=name.replace(".", r"\.")) as caught:
            call(NO_GRAPH, [], options=options)
        assert "should be bool" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("max_autotunee", r"did you mean 'max_autotune'\?"),
        ("prac-seed", r"did you mean 'prac\.seed'\?"),
        ("custom_partitioner_fn", "partitioner itself"),
    ],
)
def test_the_typed_backend_checks_keys_like_the_named_one(key: str, message: str) -> None:
    with pytest.raises(PracOptionError, match=message):
        prac(NO_GRAPH, [], options={key: None})
    with pytest.raises(PracOptionError, match=message):
        PracBackend(PracConfig())(NO_GRAPH, [], options={key: None})


def test_an_unknown_mode_is_refused_before_tracing() -> None:
    with pytest.raises(PracOptionError, match="mode=fastest"):
        prac(NO_GRAPH, [], mode="fastest")


def test_a_partitioner_in_inductors_config_is_refused() -> None:
    with (
        inductor_config.patch(custom_partitioner_fn=lambda *args, **kwargs: None),
        pytest.raises(PracOptionError, match=r"config\.custom_partitioner_fn is set"),
    ):
        prac(NO_GRAPH, [])


# -- through torch.compile ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prac.principle": 0.3}, r"'prac\.principle' \(did you mean 'prac\.principal'\?\)"),
        ({"prac.principal": 3.0}, r"prac\.principal=3\.0: expected a fraction"),
        ({"max_autotunee": True}, r"did you mean 'max_autotune'\?"),
        ({"max_autotune": 3}, "max_autotune, got int should be bool"),
    ],
)
def test_torch_compile_raises_the_option_error_itself(options: Any, message: str) -> None:
    compiled = torch.compile(nn.Linear(8, 8), backend="prac", options=options)
    with pytest.raises(PracOptionError, match=message) as caught:
        compiled(torch.zeros(4, 8))
    # not Dynamo's BackendCompilerFailed around it
    assert type(caught.value) is PracOptionError
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, PracError)
    assert str(caught.value).startswith(("unknown option", "prac.", "options:"))


def test_torch_compile_of_a_typed_backend_takes_no_prac_options() -> None:
    compiled = torch.compile(nn.Linear(8, 8), backend=prac_fx.backend(), options={"prac.seed": 1})
    with pytest.raises(PracOptionError, match=r"'prac\.seed' contradicts the PracConfig"):
        compiled(torch.zeros(4, 8))


@pytest.fixture
def warnings_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Texts of the PracWarnings while a linear meets inputs of the given numbers of rows."""

    def compile_nothing(gm: fx.GraphModule, *args: object) -> Callable[..., Any]:
        # as Inductor does, and then Python forgets which warnings it has shown
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
        forward: Callable[..., Any] = gm.forward
        return forward

    monkeypatch.setattr(dynamo_backend, "_compile", compile_nothing)

    def run(rows: list[int], **options: Any) -> list[str]:
        given = {f"prac.{name}": value for name, value in options.items()}
        compiled = torch.compile(nn.Linear(8, 8), backend="prac", options=given)
        with warnings.catch_warnings(record=True) as caught:
            # what Python does unless told otherwise: once for each text and place
            warnings.simplefilter("default")
            for count in rows:
                compiled(torch.zeros(count, 8))
        return [str(w.message) for w in caught if issubclass(w.category, PracWarning)]

    return run


def test_pac_warns_of_its_bias(warnings_of: Callable[..., list[str]]) -> None:
    (text,) = warnings_of([4], random=0)
    assert "prac.random=0 (PAC)" in text
    assert "biased" in text


def test_pamm_warns_of_its_bias(warnings_of: Callable[..., list[str]]) -> None:
    for options in ({"weight_gradient": "pamm"}, {"rules": [("*", "pamm")]}):
        torch._dynamo.reset()
        (text,) = warnings_of([4], **options)
        assert "'pamm'" in text.replace('"', "'")
        assert "biased" in text


def test_pac_warns_once_for_all_graphs(warnings_of: Callable[..., list[str]]) -> None:
    # the second number of rows compiles again
    assert len(warnings_of([4, 6], random=0)) == 1


def test_pac_warns_again_for_another_call(warnings_of: Callable[..., list[str]]) -> None:
    for _ in range(2):
        torch._dynamo.reset()
        assert len(warnings_of([4], random=0)) == 1


def test_warnings_can_be_errors(warnings_of: Callable[..., list[str]]) -> None:
    linear = nn.Linear(8, 8)
    given = [{"options": {"prac.random": 0}, "backend": "prac"}, {"backend": prac_fx.backend(PracConfig(random=0))}]  # fmt: skip
    for compiled in [torch.compile(linear, **one) for one in given]:
        torch._dynamo.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("error", PracWarning)
            for _ in range(2):
                with pytest.raises(Exception, match=r"prac\.random=0 \(PAC\)"):
                    compiled(torch.zeros(4, 8))
            warnings.simplefilter("ignore", PracWarning)
            compiled(torch.zeros(4, 8))


def test_a_warning_is_about_a_line_of_the_user(warnings_of: Callable[..., list[str]]) -> None:
    compiled = torch.compile(nn.Linear(8, 8), backend="prac", options={"prac.random": 0})
    with pytest.warns(PracWarning) as caught:
        compiled(torch.zeros(4, 8))
    assert [warning.filename for warning in caught] == [__file__]


def test_unbiased_settings_do_not_warn(warnings_of: Callable[..., list[str]]) -> None:
    assert warnings_of([4]) == []
    assert warnings_of([4], principal=0) == []


# -- policies, parts and rules --------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_sets_what_the_user_does_not(policy: str) -> None:
    config = PracConfig(policy=policy)
    assert config.input_gradient == POLICIES[policy]["input_gradient"]
    changed = PracConfig(policy=policy, input_gradient="exact", refresh_every=7)
    assert (changed.input_gradient, changed.refresh_every) == ("exact", 7)
    assert changed.attention == config.attention


def test_the_paper_policy_is_the_papers() -> None:
    config = PracConfig(policy="paper")
    assert config.for_role("principal", "weight_gradient") == 0.3
    assert config.for_role("random", "input_gradient") == 0.2
    assert (config.refresh_every, config.blocks, config.attention) == (500, 1, "exact")


def test_one_setting_per_role() -> None:
    config = PracConfig(tail_every={"input_gradient": 1, "weight_gradient": None})
    assert config.for_role("tail_every", "input_gradient") == 1
    assert config.for_role("tail_every", "weight_gradient") is None
    assert dataclasses.replace(config) == config


@pytest.mark.parametrize("bad", [-0.1, 1.5, True, "half"])
def test_a_bad_value_for_one_role_is_refused(bad: Any) -> None:
    with pytest.raises(PracOptionError, match=r"prac\.random"):
        PracConfig(random={"weight_gradient": 0.3, "input_gradient": bad})


def test_an_unknown_codec_in_a_rule_is_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(PracOptionError, match=r"unknown codec.*did you mean 'int4'\?"):
        PracConfig(rules=[("*.mlp.*", "in4")])


@pytest.mark.parametrize("rule", ["*", ("*",), ("*", 4), ("", "int4"), ("a", "int4", "b")])
def test_a_malformed_rule_is_refused(rule: Any) -> None:
    with pytest.raises(PracOptionError, match=r"pairs, such as"):
        PracConfig(rules=[rule])
