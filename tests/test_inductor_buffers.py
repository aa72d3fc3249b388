"""Plans of single graphs, as Inductor would run them."""

from __future__ import annotations

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from prac_fx.memory.inductor_buffers import plan_graph
from prac_fx.torch_compat import FakeTensorMode


def test_a_graph_of_views_has_no_kernel() -> None:
    """Its output is its input, and it allocates nothing."""
    with FakeTensorMode():
        x = torch.zeros(4, 6)
        gm = make_fx(lambda x: [torch.ops.aten.view(x, [6, 4])])(x)
    plan = plan_graph(gm, [x])
    assert plan.kernels == ()
    assert [value.nbytes for value in plan.inputs.values()] == [96]
