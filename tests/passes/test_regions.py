"""Regions that backward computes again: what may start from a decoded value, what may not, and who decided."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from prac_fx.codecs import QuantCodec
from prac_fx.passes.chains import is_repeatable
from prac_fx.passes.draws import is_random
from prac_fx.torch_compat import functorch_config, inductor_config
from tests.graphs import Traced, rows_of, trace
from tests.passes.modules import FEATURES, inputs

OPTIONS = {"policy": "balanced", "weight_gradient": "exact", "rounding": "nearest"}


class Checkpointed(nn.Module):
    """embed, then a region of two matmuls with a function in between, then a head."""

    def __init__(self, function: Callable[[Tensor], Tensor] = torch.sin, **options: object) -> None:
        super().__init__()
        self.embed = nn.Linear(FEATURES, FEATURES, bias=False)
        self.up = nn.Linear(FEATURES, FEATURES, bias=False)
        self.down = nn.Linear(FEATURES, FEATURES, bias=False)
        self.head = nn.Linear(FEATURES, 8, bias=False)
        self.function = function
        self.options = {"use_reentrant": False, **options}

    def region(self, x: Tensor) -> Tensor:
        return self.down(self.function(self.up(x)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(checkpoint(self.region, x, **self.options)).sum()


def _decisions(traced: Traced) -> dict[str, str]:
    """Module of each value that is no input -> codec or reason."""
    return {
        value.origin.module: value.stored_as if value.codec else value.reason
        for value in traced.plan.values
        if value.reason != "input"
    }


def test_a_region_starts_from_the_exact_value_by_default() -> None:
    plan = trace(Checkpointed(), inputs(), **OPTIONS).plan
    assert_expected_inline(
        rows_of(plan),
        """\
embed                                      512x64       W+A  keep      feeds_recomputed
sin.default                                512x64       -    recompute checkpointed
down                                       512x64       -    recompute checkpointed""",
    )
    assert not plan.sites


def test_a_region_is_cloned_from_the_decoded_value() -> None:
    traced = trace(Checkpointed(), inputs(), **OPTIONS, checkpoint_inputs="int8")
    assert_expected_inline(
        rows_of(traced.plan),
        """\
embed                                      512x64       W+A  encode    int8/128 nearest
sin.default                                512x64       -    recompute checkpointed
down                                       512x64       -    recompute checkpointed""",
    )
    assert_expected_inline(
        traced.graphs["bw"],
        """\
primals_2: 512x64
primals_3: 64x64
primals_4: 64x64
primals_5: 8x64
stored: 512x16
stored_1: 512x1
tangents_1: scalar
expand_1 = expand(tangents_1, [512, 8]) -> 512x8
permute_1 = permute(expand_1, [1, 0]) -> 8x512
decoded = decode[int8/128 nearest](stored, stored_1) -> 512x64  # backward
permute_2 = permute(primals_3, [1, 0]) -> 64x64
mm_1 = mm(decoded, permute_2) -> 512x64  # backward
sin_1 = sin(mm_1) -> 512x64  # backward
permute_3 = permute(primals_4, [1, 0]) -> 64x64
mm_2 = mm(sin_1, permute_3) -> 512x64  # backward
mm_3 = mm(permute_1, mm_2) -> 8x64
permute_4 = permute(primals_5, [1, 0]) -> 64x8
permute_5 = permute(permute_4, [1, 0]) -> 8x64
mm_4 = mm(expand_1, permute_5) -> 512x64
permute_6 = permute(mm_4, [1, 0]) -> 64x512
mm_5 = mm(permute_6, sin_1) -> 64x64
permute_7 = permute(permute_3, [1, 0]) -> 64x64
mm_6 = mm(mm_4, permute_7) -> 512x64
cos_1 = cos(mm_1) -> 512x64  # backward
mul_1 = mul(mm_6, cos_1) -> 512x64
permute_8 = permute(mul_1, [1, 0]) -> 64x512
mm_7 = mm(permute_8, decoded) -> 64x64
permute_9 = permute(permute_2, [1, 0]) -> 64x64
mm_8 = mm(mul_1, permute_9) -> 512x64
permute_10 = permute(mm_8, [1, 0]) -> 64x512
mm_9 = mm(permute_10, primals_2) -> 64x64
return mm_9, None, mm_7, mm_5, mm_3""",
    )


def _in_backward(traced: Traced, operator: str) -> list[str]:
    """Lines of the backward graph with this operator that only exist because of an encoding."""
    lines = traced.graphs["bw"].splitlines()
    return [line for line in lines if f" = {operator}(" in line and line.endswith("# backward")]


def _encoded(function: Callable[[Tensor], Tensor], **options: object) -> Traced:
    model = Checkpointed(function, **options)
    return trace(model, inputs(), **OPTIONS, checkpoint_inputs="int8")


def _heads(x: Tensor, dropout: float = 0.0) -> Tensor:
    x = x.view(8, 64, 4, 16).transpose(1, 2)
    x = F.scaled_dot_product_attention(x, x, x, dropout_p=dropout, is_causal=True)
    return x.transpose(1, 2).reshape(512, FEATURES)


def test_attention_is_cloned() -> None:
    """Torch tags every attention operator as random, for its dropout. Without dropout there is none."""
    traced = _encoded(_heads)
    assert _decisions(traced)["embed"].startswith("int8")
    (attention,) = _in_backward(traced, "_scaled_dot_product_flash_attention_for_cpu")
    assert "decoded" not in attention  # it reads clones, in the layout that the kernel expects
    assert "run_with_rng_state" not in traced.graphs["bw"]


def test_a_regions_own_statistics_are_cloned() -> None:
    """Outside a region they would be saved; in a region the user wants nothing saved."""
    traced = _encoded(lambda x: F.layer_norm(x, (FEATURES,)))
    assert len(_in_backward(traced, "var_mean")) == 1
    assert not traced.plan.statistics


def test_random_numbers_that_do_not_read_the_input_are_drawn_again_by_torch() -> None:
    traced = _encoded(lambda x: F.dropout(x, 0.5))
    assert _decisions(traced)["embed"].startswith("int8")
    assert not _in_backward(traced, "inductor_random")
    assert "inductor_random" in traced.graphs["bw"]  # from the same saved seed


@pytest.mark.parametrize(
    "function", [lambda x: F.dropout(x, 0.5), partial(_heads, dropout=0.5)], ids=["dropout", "sdpa"]
)
def test_random_numbers_that_read_the_input_keep_it_exact(
    function: Callable[[Tensor], Tensor],
) -> None:
    with inductor_config.patch(fallback_random=True):
        traced = _encoded(function)
    assert _decisions(traced)["embed"] == "draws_random_numbers"
    assert not traced.plan.sites


def test_what_cannot_be_cloned_is_recognised() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    attention = torch.ops.aten._scaled_dot_product_flash_attention.default
    assert not is_random(graph.call_function(attention, (x, x, x)))
    assert not is_random(graph.call_function(attention, (x, x, x, 0.0, True)))
    assert is_random(graph.call_function(attention, (x, x, x, 0.1)))
    assert is_random(graph.call_function(attention, (x, x, x), {"dropout_p": 0.1}))
    assert is_random(graph.call_function(torch.ops.aten.rand_like.default, (x,)))
    assert not is_repeatable(graph.call_function(torch.ops.aten.rand_like.default, (x,)))
    assert not is_repeatable(graph.call_function(torch.ops.aten.add_.Tensor, (x, x)))
    assert not is_repeatable(graph.call_function(torch.ops.higher_order.flex_attention, (x,)))
    assert is_repeatable(graph.call_function(torch.ops.aten.mm.default, (x, x)))


def test_values_that_a_selective_policy_saves() -> None:
    """The policy says what is saved; how it is stored is the option's, for elementwise code starts from it."""

    def save_matmuls(context: object, operator: object, *args: object, **kwargs: object) -> object:
        is_matmul = operator is torch.ops.aten.mm.default
        return CheckpointPolicy.MUST_SAVE if is_matmul else CheckpointPolicy.PREFER_RECOMPUTE

    model = Checkpointed(context_fn=partial(create_selective_checkpoint_contexts, save_matmuls))
    exact = trace(model, inputs(), **OPTIONS)
    assert _decisions(exact)["up"] == "feeds_recomputed"
    encoded = trace(model, inputs(), **OPTIONS, checkpoint_inputs="int8")
    assert _decisions(encoded)["up"].startswith("int8")
    assert not _in_backward(encoded, "mm")


def test_a_rule_wins_over_the_option() -> None:
    options = {**OPTIONS, "checkpoint_inputs": "int8"}
    exact = trace(Checkpointed(), inputs(), **options, rules=[("embed", "exact")])
    assert _decisions(exact)["embed"] == "rule"
    other = trace(Checkpointed(), inputs(), **options, rules=[("embed", "int4")])
    assert _decisions(other)["embed"].startswith("int4")


# -- other tools that decide ----------------------------------------------------------------------


class Straight(nn.Sequential):
    """Two blocks without checkpoints."""

    def __init__(self) -> None:
        linears = [nn.Linear(FEATURES, FEATURES, bias=False) for _ in range(4)]
        super().__init__(linears[0], nn.Tanh(), linears[1], nn.Tanh(), linears[2], linears[3])


def test_the_report_names_what_the_memory_budget_decided() -> None:
    plain = trace(Straight(), inputs(), **OPTIONS).plan
    assert "memory_budget" not in {value.reason for value in plain.values}
    with functorch_config.patch(activation_memory_budget=0.4):
        kept = trace(Straight(), inputs(), **OPTIONS).plan
        traced = trace(Straight(), inputs(), **OPTIONS, checkpoint_inputs="int8")
    assert_expected_inline(
        rows_of(kept),
        """\
1                                          512x64       W+A  keep      feeds_recomputed
3                                          512x64       -    recompute memory_budget
4                                          512x64       -    recompute memory_budget""",
    )
    assert kept.nbytes_before < plain.nbytes_before
    assert any(isinstance(site.codec, QuantCodec) for site in traced.plan.sites)
    assert "feeds_recomputed" not in {value.reason for value in traced.plan.values}
    assert traced.plan.nbytes_after < kept.nbytes_after
    assert _in_backward(traced, "mm")


@pytest.mark.skipif(
    not hasattr(torch.autograd.graph, "region_activation_memory_budget"), reason="torch 2.13"
)
def test_a_budget_of_one_region_covers_what_we_add() -> None:
    """Torch refuses a graph with a node that the annotation does not cover."""

    class Annotated(Straight):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autograd.graph.region_activation_memory_budget(0.4):
                return super().forward(x)

    plan = trace(Annotated(), inputs(), **OPTIONS, checkpoint_inputs="int8").plan
    assert plan.sites
    assert "memory_budget" in {value.reason for value in plan.values}


def test_offloaded_values_are_torchs() -> None:
    def mark(graph: fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.tanh.default):
            node.meta["should_offload"] = True

    with (
        functorch_config.patch(enable_activation_offloading=True),
        inductor_config.patch(joint_custom_post_pass=mark),
    ):
        traced = trace(Straight(), inputs(), **{**OPTIONS, "weight_gradient": "int8"})
    assert _decisions(traced) == {
        "1": "offloaded",
        "3": "offloaded",
        "4": "int8/128 nearest",
    }
    offloaded = next(v for v in traced.plan.values if v.reason == "offloaded")
    assert offloaded.nbytes_before == offloaded.nbytes_after == 0
    assert offloaded.detail == "128.0 KiB"
    assert "device_put" in traced.graphs["fw"]
    assert traced.result is not None
    assert sum(value.nbytes for value in traced.result.saved) == traced.plan.nbytes_after
