"""Part of `plan`: the site of a value, once its codec is chosen."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx as fx

from prac_fx.codecs import ELEMENTWISE, OF_WEIGHT_GRADIENTS, BitCodec, Codec
from prac_fx.config import PracConfig
from prac_fx.graph.graph_edit import allocating_node, tensor_value
from prac_fx.graph.nbytes import is_symbolic, size_hint, value_nbytes
from prac_fx.graph.row_layout import Layout, layout_of
from prac_fx.passes.choose import ENCODABLE_DTYPES, Chooser
from prac_fx.passes.common_matrix import CommonMatrix, common_matrix
from prac_fx.passes.joint_graph import JointGraph
from prac_fx.passes.plan_data import (
    DecodedSite,
    FactoredSite,
    Keep,
    Owner,
    PlannedValue,
    Site,
)
from prac_fx.passes.quantizer import quantizer
from prac_fx.passes.ranks import (
    Projected,
    check_rank,
    check_tokens,
    choose_codec,
    least_tokens,
    with_coordinates,
)
from prac_fx.passes.roles import ValueRole
from prac_fx.passes.sizes import Bound, Size, Sizes, is_guardable
from prac_fx.passes.worthwhile import check_worthwhile, describe_cost

# With fewer features a scale for each row takes most of what is stored.
_MIN_FEATURES = 8


@dataclass(frozen=True)
class Encoding:
    """What a row says of a value that is encoded.

    Attributes:
        codec: how it is stored.
        nbytes: bytes that stay stored.
        state_nbytes: bytes of its basis and its sampled rows.
        detail: for the reader of the report.
        shares: name of the node that allocates another value, if what is stored for that serves the
            readers of this one, too. Then nothing is stored for this.
    """

    codec: Codec
    nbytes: int
    state_nbytes: int = 0
    detail: str = ""
    shares: str = ""

    def row(self, row: PlannedValue) -> PlannedValue:
        """The row of the value as encoded, made of the row that says it is kept."""
        if self.shares:
            return replace(
                row, decision="recompute", reason="derived", detail=self.detail, nbytes_after=0
            )
        return replace(
            row,
            decision="encode",
            reason="",
            detail=self.detail,
            nbytes_after=self.nbytes,
            state_nbytes=self.state_nbytes,
            codec=self.codec,
        )


class Sites:
    """The sites of one draft of a plan.

    Attributes:
        by_root: site of each encoded value, by the node that allocates it.
        bounds: the sizes that decisions rest on, to encode a value or to compute it again.
    """

    def __init__(self, chooser: Chooser, sizes: Sizes) -> None:
        self._chooser, self._sizes = chooser, sizes
        self._slots: dict[int, int] = {}
        self._shared: list[fx.Node] = []  # values whose readers take the coordinates of another
        self.by_root: dict[fx.Node, Site] = {}
        self.bounds: list[Bound] = []

    @property
    def _joint(self) -> JointGraph:
        return self._chooser.joint

    @property
    def _config(self) -> PracConfig:
        return self._chooser.config

    @property
    def decoded(self) -> list[fx.Node]:
        """The roots of values that backward decodes, masks among them."""
        return [n for n, site in self.by_root.items() if isinstance(site, DecodedSite)]

    @property
    def factored(self) -> list[fx.Node]:
        """The roots of values that only weight gradients read, and that nothing decodes."""
        own = [n for n, site in self.by_root.items() if isinstance(site, FactoredSite)]
        return own + self._shared

    # -- elementwise codecs ------------------------------------------------------------------------

    def quantize(self, role: ValueRole, name: str, detail: str = "") -> Encoding:
        """Store the whole allocation of a value with an elementwise codec, or a mask as bits.

        Args:
            role: of the value.
            name: of the codec, or "bits".
            detail: for the row.

        Raises:
            Keep: the value does not suit the codec.
        """
        layout = self._whole_allocation(role)
        root = allocating_node(role.value.node)
        value = _tensor(root)
        _check_features(layout)
        codec: Codec = BitCodec(layout.features)
        if name != "bits":
            codec = quantizer(name, layout.features, value.device, self._config)
        self._check_device(root, codec)
        nbytes = _stored_nbytes(codec, layout, value)
        if nbytes >= role.value.nbytes:
            raise Keep("codec_saves_nothing", codec.describe())
        self.by_root[root] = DecodedSite(**_common(root), codec=codec, layout=layout)
        self.bound_by_nbytes(root)
        return Encoding(codec, nbytes, detail=detail)

    def pack(self, mask: fx.Node) -> Encoding:
        """Store as bits a mask that plain Inductor does not save.

        Raises:
            Keep: it cannot be packed.
        """
        value = _tensor(mask)
        layout = layout_of(value)
        if layout is None:
            raise Keep("not_dense")
        _check_features(layout)
        codec = BitCodec(layout.features)
        self.by_root[mask] = DecodedSite(**_common(mask), codec=codec, layout=layout)
        return Encoding(codec, _stored_nbytes(codec, layout, value))

    def store_clone(self, node: fx.Node) -> Encoding:
        """Store what backward computes from a value, with the codec of the input gradient.

        Raises:
            Keep: it cannot be encoded.
        """
        codec, layout, nbytes = self._clone_codec(node)
        self.by_root[node] = DecodedSite(**_common(node), codec=codec, layout=layout)
        return Encoding(codec, nbytes)

    def clone_nbytes(self, node: fx.Node) -> int | None:
        """Bytes that `store_clone` would store; None when it cannot."""
        try:
            return self._clone_codec(node)[2]
        except Keep:
            return None

    def _clone_codec(self, node: fx.Node) -> tuple[Codec, Layout, int]:
        value = tensor_value(node)
        if value is None or value.dtype not in ENCODABLE_DTYPES:
            raise Keep("not_floating_point")
        if node.name in self._chooser.blocked:
            raise Keep("cannot_rewrite")
        layout = layout_of(value)
        if layout is None:
            raise Keep("not_dense")
        _check_features(layout)
        name = self._config.input_gradient
        name = name if name in ELEMENTWISE else "int8"
        codec = quantizer(str(name), layout.features, value.device, self._config)
        self._check_device(node, codec)
        return codec, layout, _stored_nbytes(codec, layout, value)

    # -- PRAC --------------------------------------------------------------------------------------

    def project(self, role: ValueRole) -> Encoding:
        """Store the whole allocation of a value as coordinates, which backward decodes.

        Raises:
            Keep: the ranks do not suit the value.
        """
        layout = self._whole_allocation(role)
        root = allocating_node(role.value.node)
        value, n = _tensor(root), layout.features
        tokens = self._sizes.at_hand(value.numel() // n)
        matrix = Projected(tokens, n, value.itemsize, 0, "input_gradient", value.device)
        codec = self._projection(root, matrix)
        owner = self._owner(self._joint.owner, matrix)
        site = DecodedSite(**_common(root), codec=codec, owner=owner, layout=layout)
        return self._add_projected(role, root, matrix, site)

    def factor(self, role: ValueRole, *, only_if_worthwhile: bool = False) -> Encoding:
        """Store as coordinates a value that only weight gradients read; they are made from these.

        Args:
            role: of the value.
            only_if_worthwhile: only where that costs less than exact weight gradients do.

        Raises:
            Keep: the readers see different matrices, the ranks do not suit the matrix, or PRAC is
                not worthwhile.
        """
        common = common_matrix(role.readers)
        value, root, n = common.value, allocating_node(role.value.node), common.features
        tokens = self._sizes.at_hand(value.numel() // n)
        # of as many tokens as the decision is about, which may be more than there are
        share = size_hint(tokens) / max(1, size_hint(value.numel()) // n)
        matrix = Projected(
            tokens,
            n,
            value.itemsize,
            common.outputs,
            "weight_gradient",
            value.device,
            is_batch=value.dim() > 2 or common.is_grouped,
            products=round(share * common.products) if common.is_grouped else 0,
            columns=common.columns,
        )
        sharing = self._sharing(common)
        if sharing is not None:
            return self._share(role, common, matrix, sharing, only_if_worthwhile)
        codec = self._projection(root, matrix)
        if only_if_worthwhile:
            check_worthwhile(matrix, codec)
        owner = self._owner(min(reader.owner for reader in role.readers), matrix)
        site = _factored_site(root, common, codec, owner)
        return self._add_projected(role, common.node, matrix, site, describe_cost(matrix, codec))

    def _sharing(self, common: CommonMatrix) -> FactoredSite | None:
        """The site whose coordinates serve these readers, too; None when there is none.

        The router and the shared experts of a layer read a value of which its experts read rows.
        """
        for site in self.by_root.values():
            if (
                isinstance(site, FactoredSite)
                and (site.matrix, site.transposed) == (common.node.name, common.transposed)
                and site.codec.subspace is not None
                and (site.codec.subspace.blocks == 1 or not common.is_grouped)
            ):
                return site
        return None

    def _share(
        self,
        role: ValueRole,
        common: CommonMatrix,
        matrix: Projected,
        site: FactoredSite,
        only_if_worthwhile: bool,
    ) -> Encoding:
        """Make these weight gradients, too, from coordinates that are stored already."""
        if only_if_worthwhile:
            check_worthwhile(matrix, site.codec)
        source = next(root for root, other in self.by_root.items() if other is site)
        readers = (*site.readers, *common.readers)
        offsets = site.offsets if site.offsets == common.offsets else ""
        self.by_root[source] = replace(site, readers=readers, offsets=offsets)
        self._shared.append(allocating_node(role.value.node))
        cost = describe_cost(matrix, site.codec)
        detail = f"from the coordinates of {site.value}; {cost}"
        return Encoding(site.codec, 0, detail=detail, shares=site.value)

    def _projection(self, root: fx.Node, matrix: Projected) -> Codec:
        """Ranks, blocks and coordinates."""
        check_rank(matrix, self._config)
        projection = choose_codec(matrix, self._config)
        codec = with_coordinates(projection, self._config, matrix)
        check_tokens(matrix, projection.rank, codec, self._config, self._sizes)
        self._check_device(root, codec)
        return codec

    def _owner(self, argument: int, matrix: Projected) -> Owner:
        slot = self._slots.get(argument, 0)
        return Owner(argument, self._joint.name_of(argument), slot, matrix.role)

    def _add_projected(
        self, role: ValueRole, node: fx.Node, matrix: Projected, site: Site, detail: str = ""
    ) -> Encoding:
        """Note the site of a value, of which `node` has the matrix."""
        assert site.owner is not None
        assert site.codec.subspace is not None
        self._slots[site.owner.argument] = site.owner.slot + 1
        rank = site.codec.subspace.rank
        least = least_tokens(matrix, rank, site.codec, self._config)
        runs_from, made_from = (matrix.features * tokens for tokens in least)
        self._bound(node, runs_from, made_from, has_state=True)
        self.by_root[allocating_node(role.value.node)] = site
        return Encoding(
            site.codec,
            site.codec.stored_nbytes(size_hint(matrix.tokens), matrix.itemsize),
            site.codec.state_nbytes(matrix.itemsize),
            detail,
        )

    # -- other codecs of weight gradients ----------------------------------------------------------

    def sample(self, role: ValueRole, name: str) -> Encoding:
        """Store so much of a value that only weight gradients read that they can be estimated.

        Args:
            role: of the value.
            name: of the codec, a key of `codecs.OF_WEIGHT_GRADIENTS`.

        Raises:
            Keep: something else reads it, too, or the value does not suit the codec.
        """
        if role.role != "W":
            raise Keep("not_decodable", name)
        common = common_matrix(role.readers)
        if common.is_grouped:
            raise Keep("layouts_differ", "experts read groups of its rows")
        value, root, n = common.value, allocating_node(role.value.node), common.features
        matrices = value.shape[0] if value.dim() > 2 else 1
        if not isinstance(matrices, int):
            raise Keep("symbolic_size", f"{matrices} matrices")
        self.check_size(root)
        codec = OF_WEIGHT_GRADIENTS[name](n, getattr(self._config, name), matrices)
        self._check_device(root, codec)
        nbytes = codec.stored_nbytes(size_hint(value.numel()) // n, value.itemsize)
        if nbytes >= role.value.nbytes:
            raise Keep("codec_saves_nothing", codec.describe())
        self.by_root[root] = _factored_site(root, common, codec)
        self.bound_by_nbytes(root)
        return Encoding(codec, nbytes)

    # -- checks and bounds -------------------------------------------------------------------------

    def _whole_allocation(self, role: ValueRole) -> Layout:
        """The layout of a value that is to be decoded in backward."""
        root = allocating_node(role.value.node)
        region = self._chooser.region_from(root)
        if region is not None:
            self._chooser.check_region(region)
        self.check_size(root)
        layout = layout_of(_tensor(root))
        if layout is None:
            raise Keep("symbolic_size" if is_symbolic(_tensor(root)) else "not_dense")
        return layout

    def check_size(self, node: fx.Node) -> None:
        """Is a value large enough?

        Raises:
            Keep: it is too small, or it may be because its size is symbolic.
        """
        value = _tensor(node)
        if not self._sizes.reaches(value.numel(), self._least_elements(value), always=False):
            shape = "x".join(map(str, value.shape))
            raise Keep("symbolic_size" if is_symbolic(value) else "too_small", shape)

    def _check_device(self, root: fx.Node, codec: Codec) -> None:
        """Refuse another device: values that round stochastically share the seed, on one device."""
        if codec.rounding is not None and self._is_elsewhere(root):
            raise Keep("other_device", str(_tensor(root).device))

    def _is_elsewhere(self, root: fx.Node) -> bool:
        devices = {site.device for site in self.by_root.values() if site.rounding}
        return bool(devices) and _tensor(root).device not in devices

    def bound_by_nbytes(self, node: fx.Node) -> None:
        """Note that a decision rests on `prac.min_nbytes` alone."""
        least = self._least_elements(_tensor(node))
        self._bound(node, least, least, has_state=False)

    def _least_elements(self, value: torch.Tensor) -> int:
        return -(-self._config.min_nbytes // value.itemsize)

    def _bound(self, node: fx.Node, runs_from: int, made_from: int, *, has_state: bool) -> None:
        """Note that a decision rests on a value having so many elements."""
        value = _tensor(node)
        size: Size = value.numel()
        if not isinstance(size, int) and is_guardable(size):
            self.bounds.append(Bound(size, runs_from, made_from, value_nbytes(value), has_state))


def _tensor(node: fx.Node) -> torch.Tensor:
    value = tensor_value(node)
    assert value is not None
    return value


def _common(root: fx.Node) -> dict[str, Any]:
    value = _tensor(root)
    return {"value": root.name, "dtype": value.dtype, "device": value.device}


def _check_features(layout: Layout) -> None:
    if layout.features < _MIN_FEATURES:
        raise Keep("too_few_features", f"{layout.features} features")


def _stored_nbytes(codec: Codec, layout: Layout, value: torch.Tensor) -> int:
    return codec.stored_nbytes(size_hint(value.numel()) // layout.features, value.itemsize)


def _factored_site(
    root: fx.Node, common: CommonMatrix, codec: Codec, owner: Owner | None = None
) -> FactoredSite:
    return FactoredSite(
        **_common(root),
        codec=codec,
        owner=owner,
        matrix=common.node.name,
        transposed=common.transposed,
        readers=common.readers,
        offsets=common.offsets,
    )
