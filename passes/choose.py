"""Part of `plan`: the codec that the options choose for a value, or why the value is kept."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
import torch.fx as fx

from prac_fx.config import PracConfig
from prac_fx.graph.graph_edit import allocating_node, row_gather, tensor_value
from prac_fx.graph.nbytes import format_nbytes, storage_nbytes
from prac_fx.passes.chains import Region, is_statistic, region_from
from prac_fx.passes.draws import is_random
from prac_fx.passes.joint_graph import JointGraph
from prac_fx.passes.plan_data import Keep, PlannedValue, Reason
from prac_fx.passes.roles import Reader, ValueRole
from prac_fx.torch_compat import is_random_state

ENCODABLE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Chooser:
    """The options, and what is known of one joint graph.

    Attributes:
        joint: the graph.
        config: the user's options.
        blocked: names of values to keep, because encoding them failed.
        kept: values that may not be decoded, by the node that allocates them, and why.
    """

    joint: JointGraph
    config: PracConfig
    blocked: Collection[str]
    kept: Mapping[fx.Node, Reason]

    def choose(self, role: ValueRole, row: PlannedValue) -> str:
        """Name of the codec for a value: "bits", or a name that an option may have.

        Raises:
            Keep: it stays exact.
        """
        if self._is_rows_of_a_weight(role):
            self._check_lossless(role, row)
            return "recompute"
        self._check_value(role, row)
        if row.dtype == "bool":
            return "bits"
        region = self.region_from(allocating_node(role.value.node))
        if region is not None and role.role != "W":
            self.check_region(region)
        part, reason = _part(role, region)
        for pattern, codec in self.config.rules:
            if _matches(row, (pattern,)):
                if codec == "exact":
                    raise Keep("rule", f"rule {pattern!r}")
                return codec
        chosen: str = getattr(self.config, part)
        if chosen == "exact":
            raise Keep(reason, _targets(role.readers))
        return chosen

    def region_from(self, root: fx.Node) -> Region | None:
        """The region that backward computes again from a value; None when there is none."""
        return region_from(root, self.joint.classification, self.joint.survey.recomputed)

    def check_region(self, region: Region) -> None:
        """May a region start from a decoded value?

        Raises:
            Keep: it has to start from the exact one.
        """
        again = f"backward computes {region.start.name} again from it"
        if self.config.checkpoint_inputs == "exact":
            raise Keep("feeds_recomputed", again)
        node = region.unrepeatable
        if node is not None:
            reason = "draws_random_numbers" if is_random(node) else "feeds_recomputed"
            raise Keep(reason, f"{again}, and {node.target} cannot be cloned")

    def _check_value(self, role: ValueRole, row: PlannedValue) -> None:
        """May a value be encoded, whatever the codec?"""
        saved = role.value
        value, root = tensor_value(saved.node), allocating_node(saved.node)
        assert value is not None
        is_mask = value.dtype == torch.bool and self.config.input_gradient != "exact"
        if is_mask:  # packing it loses nothing
            self._check_lossless(role, row)
            return
        _check_storage(role, value)
        if root not in self.joint.classification.activations:
            raise Keep("not_an_activation", "random state" if is_random_state(saved.node) else "")
        self._check_noise(role, row, root)

    def _is_rows_of_a_weight(self, role: ValueRole) -> bool:
        """Are these the weights of the expert of each token? The weights are there anyway."""
        gathered = row_gather(allocating_node(role.value.node))
        return gathered is not None and gathered[0] not in self.joint.classification.activations

    def _check_lossless(self, role: ValueRole, row: PlannedValue) -> None:
        """May a value be stored otherwise, or not at all, without a loss?"""
        value = tensor_value(role.value.node)
        assert value is not None
        _check_storage(role, value)
        if role.role == "-":
            raise Keep("not_read")
        if not _selected(row, self.config):
            raise Keep("excluded")
        if row.allocated_by in self.blocked:
            raise Keep("cannot_rewrite")

    def _check_noise(self, role: ValueRole, row: PlannedValue, root: fx.Node) -> None:
        """May a value be replaced by an estimate?"""
        classification = self.joint.classification
        # a view may show complex numbers as pairs, or bits as other numbers
        for value in (tensor_value(role.value.node), tensor_value(root)):
            assert value is not None
            if value.dtype not in ENCODABLE_DTYPES:
                raise Keep("not_floating_point", str(value.dtype))
        kinds = {reader.kind for reader in role.readers}
        if root in self.joint.routing:
            raise Keep("routing")
        if "attention_statistic" in kinds or is_statistic(root, classification):
            raise Keep("statistic")
        if role.role == "-":
            raise Keep("not_read")
        if role.role != "W" and root not in classification.before_parameters:
            raise Keep("loss_intermediate")
        if not _selected(row, self.config):
            raise Keep("excluded")
        if root.name in self.blocked:
            raise Keep("cannot_rewrite")
        if root in self.kept:
            raise Keep(*self.kept[root])


def _check_storage(role: ValueRole, value: torch.Tensor) -> None:
    """Does the step allocate memory for the value that nothing else holds anyway?"""
    saved = role.value
    if saved.is_input:
        raise Keep("input")
    if saved.is_offloaded:
        raise Keep("offloaded", format_nbytes(storage_nbytes(value)))
    if saved.shares_with:
        raise Keep("shared_storage", f"shares storage with {saved.shares_with}")
    if saved.is_output:
        raise Keep("user_output")


def _part(role: ValueRole, region: Region | None) -> tuple[str, str]:
    """Name of the option for a value, and why the value is kept where that option is "exact"."""
    kinds = {reader.kind for reader in role.readers}
    if role.role == "W":
        return "weight_gradient", "weight_gradient_reads_it"
    if region is not None:
        return "checkpoint_inputs", "feeds_recomputed"
    if "query_key" in kinds:
        return "query_key", "attention_reads_it"
    if "attention" in kinds:
        return "attention", "attention_reads_it"
    reason = "input_gradient_reads_it" if role.role == "A" else "also_read_elsewhere"
    return "input_gradient", reason


def _targets(readers: Sequence[Reader]) -> str:
    names = dict.fromkeys(str(reader.node.target).removeprefix("aten.") for reader in readers)
    return "read by " + ", ".join(list(names)[:3]) + (", ..." if len(names) > 3 else "")


def _selected(row: PlannedValue, config: PracConfig) -> bool:
    """Do the user's globs choose this value? They see its module and the modules that read it."""
    excluded = _matches(row, config.exclude)
    return not excluded and (not config.include or _matches(row, config.include))


def _matches(row: PlannedValue, patterns: tuple[str, ...]) -> bool:
    readers = [name.rpartition(".")[0] for name in row.read_by]
    paths = [row.origin.module, *readers, *row.read_by]
    return any(fnmatchcase(path, pattern) for path in paths for pattern in patterns)
