"""Every way to trade activation memory that a user of PyTorch has, each as one function.

The function takes a model and returns a step function. All methods train the very same parameters:
`prepared` copies the modules of a model and shares its parameters, so that the memory of ten
methods is that of one model. Dynamo keeps compiled code by backend, so each method is a backend
object of its own.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from prac_fx.compiler.dynamo_backend import prac
from prac_fx.torch_compat import compile_fx, functorch_config

Step = Callable[[Mapping[str, Tensor]], Tensor]

# what a policy that saves matmuls and attention keeps, as in torchtitan's and torch's own examples
_SAVED_OPERATORS = ("mm", "addmm", "bmm", "scaled_dot_product")


@dataclass(frozen=True)
class Method:
    """One way to run a training step.

    Attributes:
        name: as tables show it.
        gradient: `exact`, `rounded` (biased by rounding), `unbiased` or `biased`.
        backend: `eager`, `inductor` or `prac`.
        options: of `torch.compile`.
        functorch: patches of `torch._functorch.config`.
        checkpoint: `none`, `full` or `selective`, per block.
        per_block: compile each block by itself, the rest of the model stays eager.
        needs_cuda: does nothing useful on a CPU.
    """

    name: str
    gradient: str = "exact"
    backend: str = "inductor"
    options: Mapping[str, Any] = field(default_factory=dict)
    functorch: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: str = "none"
    per_block: bool = False
    needs_cuda: bool = False


def _prac(name: str, gradient: str = "unbiased", **options: Any) -> Method:
    keys = {"prac." + key: value for key, value in options.items()}
    return Method(f"prac {name}", gradient, "prac", keys)


_FP8 = {
    "post_grad_fusion_options": {
        "activation_quantization_aten_pass": {
            # without use_scaling torch's forward and backward assume different defaults
            "use_scaling": True,
            "size_in_mb": 0.01,
            "exclude_primals": True,
            "allowed_dtypes": "torch.bfloat16;torch.float32",
        }
    }
}
_CHUNKED = {"auto_chunker.enable": True}
_OFFLOAD = {"enable_activation_offloading": True}


def _compositions(method: Method, budget: bool = True) -> list[Method]:
    """A method with a chunked loss, block by block, and with the budget that costs no FLOPs."""
    changes: dict[str, dict[str, Any]] = {
        "chunked loss": {"options": {**method.options, **_CHUNKED}},
        "per block": {"per_block": True},
    }
    if budget:
        changes["budget 0.99"] = {"functorch": {"activation_memory_budget": 0.99}}
    return [replace(method, name=f"{method.name}, {what}", **how) for what, how in changes.items()]


BASELINE = Method("inductor")
BUDGETS = tuple(
    Method(f"budget {budget}", functorch={"activation_memory_budget": budget})
    for budget in (0.99, 0.7, 0.5, 0.3, 0.1)
)
OTHERS = (
    Method("eager", backend="eager"),
    Method("checkpoint, eager", backend="eager", checkpoint="full"),
    Method("checkpoint", checkpoint="full"),
    Method("selective checkpoint", checkpoint="selective"),
    Method("fp8 activations", "rounded", options=_FP8),
    Method("offload", functorch=_OFFLOAD, needs_cuda=True),
)
POLICIES = (
    _prac("linear", policy="linear"),
    _prac("balanced", policy="balanced"),
    _prac("max", policy="max"),
    _prac("paper", policy="paper"),
)
ABLATIONS = (
    _prac("PAC", "biased", policy="linear", principal=0.6, random=0),
    _prac("RAC", policy="linear", principal=0, random=0.6),
    _prac("sampled", policy="linear", weight_gradient="sampled"),
)


def _by_name(name: str) -> Method:
    return next(method for method in (*POLICIES, *ABLATIONS) if method.name == name)


# A tight budget has most of the forward pass computed again. Here that is from int8 inputs.
LOW = tuple(
    replace(
        _prac(f"{policy}, budget {budget}, int8 inputs", policy=policy, checkpoint_inputs="int8"),
        functorch={"activation_memory_budget": budget},
    )
    for policy in ("balanced", "max")
    for budget in (0.5, 0.3, 0.1)
)
# the most telling first: time may run out
COMPOSED = (
    *LOW,
    *_compositions(BASELINE, budget=False),
    *(
        composed
        for name in ("balanced", "max", "linear", "paper", "PAC", "RAC")
        for composed in _compositions(_by_name(f"prac {name}"))
    ),
)
METHODS = {
    method.name: method
    for method in (BASELINE, *BUDGETS, *OTHERS, *POLICIES, *ABLATIONS, *COMPOSED)
}


class _Backend:
    """A Dynamo backend with settings of its own that hold while it compiles."""

    def __init__(self, method: Method) -> None:
        self.method = method

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        method = self.method
        with functorch_config.patch(**method.functorch):
            if method.backend == "prac":
                return prac(gm, example_inputs, options={"prac.strict": True, **method.options})
            compiled: Callable[..., Any] = compile_fx(
                gm, list(example_inputs), config_patches=dict(method.options) or None
            )
            return compiled


def prepared(method: Method, model: nn.Module, autocast: bool = False) -> Step:
    """The forward pass of a method: inputs in, loss out.

    Args:
        method: what to do.
        model: a transformers model that returns its loss. It stays as it is; its parameters are
            shared.
        autocast: run it under bfloat16 autocast.
    """
    device = next(model.parameters()).device.type
    model = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    if method.checkpoint != "none":
        settings: dict[str, Any] = {"use_reentrant": False}
        if method.checkpoint == "selective":
            settings["context_fn"] = functools.partial(
                create_selective_checkpoint_contexts, _save_matmuls
            )
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    run: Callable[..., Any] = model
    if method.per_block:
        for block in blocks_of(model):
            block.compile(backend=_Backend(method))
    elif method.backend != "eager":
        run = torch.compile(model, backend=_Backend(method))

    def step(inputs: Mapping[str, Tensor]) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss: Tensor = run(**inputs).loss
        return loss

    return step


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The layers of a transformer: the longest list of modules in it."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len)


def _save_matmuls(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = str(operator)
    saved = any(
        f".{saved_operator}." in name or f".{saved_operator}" in name
        for saved_operator in _SAVED_OPERATORS
    )
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE
