"""The only folder that imports private parts of torch.

The test-suite runs every name below with torch 2.11.0, 2.13.0, 2.14.1 and 2.15.0. Nothing else in
prac_fx or passes may import from a module whose path has a leading underscore. `patches` has all
changes of torch's behaviour.
"""

from torch._C import _DisableAutocast as without_autocast
from torch._dynamo.exc import ShortenTraceback
from torch._functorch import config as functorch_config
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import config as inductor_config
from torch._inductor import ir as inductor_ir
from torch._inductor.codegen.cpp import CppScheduling
from torch._inductor.codegen.segmented_tree import SegmentedTree
from torch._inductor.codegen.wrapper import (
    AllocateLine,
    EfficientPeakEstimate,
    FreeIfNotReusedLine,
    FreeLine,
    ReuseLine,
)
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.custom_graph_pass import CustomPartitionerFn
from torch._inductor.graph import GraphLowering
from torch._inductor.lowering import make_pointwise, register_lowering
from torch._inductor.memory import (
    assign_memory_planning_info_for_scheduler_buffers,
    estimate_peak_memory,
    get_freeable_input_buf,
)
from torch._inductor.utils import fresh_inductor_cache
from torch._inductor.virtualized import V
from torch._inductor.virtualized import ops as inductor_ops
from torch._logging._internal import trace_structured
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import guard_or_false, statically_known_true, sym_and
from torch.utils._ordered_set import OrderedSet
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils._sympy.functions import FloorDiv
from torch.utils.checkpoint import CheckpointPolicy

from prac_fx.torch_compat.compile_cache import compile_cache_folder, graph_cache_key
from prac_fx.torch_compat.distributed import (
    active_data_parallel_group,
    as_under_ddp,
    fake_process_group,
    fsdp_parameters,
    inner_tensors,
    is_sharding_code,
)
from prac_fx.torch_compat.dynamo import (
    SymbolicSizes,
    argument_index,
    causes,
    copy_dynamo_graph,
    gradient_argument_index,
    has_promised_ranges,
    mark_symbolic,
    placeholder_source_name,
    raise_signal,
    result_index,
    tracing_fake_mode,
)
from prac_fx.torch_compat.inductor import (
    gpu_fusion_patches,
    holding_groups_in_registers,
    inductor_decompositions,
    inductor_patches,
    inplace_decisions,
    lower_and_schedule,
    results_of,
)
from prac_fx.torch_compat.isolation import compile_isolated, graph_breaks, isolated_dynamo
from prac_fx.torch_compat.partitioner import (
    has_memory_budget,
    has_tag_must_recompute,
    is_random_state,
    offloaded_node,
    rename_node,
    replace_node,
    without_autograd_cache,
    without_duplicates,
    without_memory_budget,
)
from prac_fx.torch_compat.patches import (
    annotate_seeds_with_budget,
    comparing_sparse_results,
    drawing_once,
    loop_split_where,
    peak_estimate,
    remembering_strides,
    saving_what_must_be_saved,
)
from prac_fx.torch_compat.tensors import (
    autograd_references,
    existing_storages,
    fake_tensor_in,
    has_saved_tensors_hooks,
    meta_storage,
    split_size,
    storage_key,
    symbol_names,
)

__all__ = [
    "AllocateLine",
    "CheckpointPolicy",
    "CppScheduling",
    "CustomPartitionerFn",
    "EfficientPeakEstimate",
    "FakeTensor",
    "FakeTensorMode",
    "FloorDiv",
    "FreeIfNotReusedLine",
    "FreeLine",
    "GraphLowering",
    "OrderedSet",
    "ReuseLine",
    "SegmentedTree",
    "ShortenTraceback",
    "SymbolicSizes",
    "TorchDispatchMode",
    "V",
    "active_data_parallel_group",
    "annotate_seeds_with_budget",
    "argument_index",
    "as_under_ddp",
    "assign_memory_planning_info_for_scheduler_buffers",
    "autograd_references",
    "causes",
    "comparing_sparse_results",
    "compile_cache_folder",
    "compile_fx",
    "compile_fx_inner",
    "compile_isolated",
    "copy_dynamo_graph",
    "drawing_once",
    "estimate_peak_memory",
    "existing_storages",
    "fake_process_group",
    "fake_tensor_in",
    "fresh_inductor_cache",
    "fsdp_parameters",
    "functorch_config",
    "get_freeable_input_buf",
    "gpu_fusion_patches",
    "gradient_argument_index",
    "graph_breaks",
    "graph_cache_key",
    "guard_or_false",
    "has_memory_budget",
    "has_promised_ranges",
    "has_saved_tensors_hooks",
    "has_tag_must_recompute",
    "holding_groups_in_registers",
    "inductor_config",
    "inductor_decompositions",
    "inductor_ir",
    "inductor_ops",
    "inductor_patches",
    "inner_tensors",
    "inplace_decisions",
    "is_random_state",
    "is_sharding_code",
    "is_traceable_wrapper_subclass",
    "isolated_dynamo",
    "loop_split_where",
    "lower_and_schedule",
    "make_boxed_func",
    "make_fx",
    "make_pointwise",
    "mark_symbolic",
    "meta_storage",
    "min_cut_rematerialization_partition",
    "offloaded_node",
    "peak_estimate",
    "placeholder_source_name",
    "raise_signal",
    "register_lowering",
    "remembering_strides",
    "rename_node",
    "replace_node",
    "result_index",
    "results_of",
    "saving_what_must_be_saved",
    "split_size",
    "statically_known_true",
    "storage_key",
    "sym_and",
    "symbol_names",
    "trace_structured",
    "tracing_fake_mode",
    "tree_leaves",
    "tree_map_only",
    "without_autocast",
    "without_autograd_cache",
    "without_duplicates",
    "without_memory_budget",
]
