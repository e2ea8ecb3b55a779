"""Low-rank adapters of many devices in one tensor program: a leading axis holds each head's own factors.

All local heads share one frozen W, so that simulating N devices takes one copy of it; simulate.layers.convert puts
these layers into a network, and the adapter methods (LTE, LoRA, ReLoRA, MHLoRA, AdaMix) merge and redraw them.

Legend: L local devices, K heads of a device, H = L*K local heads, M rows of one head (its samples times tokens),
R rank, I inputs, O outputs; us_HMR is s·x·Aᵀ and vs_HMR is s·g·B for the gradient g of y.

Activations keep the plain layout (samples of device 0, samples of device 1, ...) in their first dimension, so any
network that treats dimension 0 as its batch works unchanged; simulate.layers.convert swaps its parametric layers only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simulate.common.seeding import address, generator
from simulate.layers.columns import Columns, column_function, column_order, slice_order
from simulate.layers.dtypes import product_dtype
from simulate.layers.folding import folded_products
from simulate.layers.formats import Draws, Quantize, head_places, layer_draws
from simulate.layers.lazy_weight import LazyWeight
from simulate.layers.products import sum_of_rows, thin_product
from simulate.layers.quantized import QuantizedWeight, dense, mapped_copy


@dataclass(frozen=True)
class AdapterSpec:
    """Number, size and start values of the adapters that `convert` builds."""

    rank: int
    scale: float
    heads_per_device: int
    reset_less: bool
    first_device: int
    """Global index of this process's first device: draws are addressed by global head."""
    seed: int
    draws_per_head: int = 1
    """Number of independent draws of `rank` rows that make up one head's A."""
    draws: Draws = "own"
    """How A is drawn: by each head itself, orthogonal between heads, or as columns where heads cover the inputs."""
    num_heads: int = 0
    """Heads of all devices, for draws that pick columns."""
    head_ranks: tuple[int, ...] = ()
    """Rank of each head of all devices, in global order, where these differ; none: all have `rank`."""
    first_head: int | None = None
    """Global index of this process's first head, where devices have unequal numbers of heads."""
    frozen_a: bool = False
    """Whether A is frozen as drawn and only B is trained."""
    quantize: Quantize = "none"
    """Format of frozen W."""
    keeps_start: bool = True
    """Whether this process does reset-less merges, which start from W0."""
    keeps_master: bool = False
    """Whether this process keeps merged W in full precision beside the quantized one."""
    shows_master: bool = True
    """Whether the plain model gets the full-precision W; else the quantized one, which all devices hold."""

    @property
    def total_rank(self) -> int:
        """Sum of the ranks of all devices' heads."""
        return sum(self.head_ranks) or self.num_heads * self.rank

    @property
    def first_local_head(self) -> int:
        """Global index of this process's first head."""
        return self.first_device * self.heads_per_device if self.first_head is None else self.first_head

    def place(self, head: int, inputs: int) -> tuple[int, int]:
        """Return the orthogonal matrix, of those that heads share, that a head takes its rows of, and its first row."""
        if self.head_ranks:
            return head_places(self.head_ranks, inputs)[head]
        group, position = divmod(head, inputs // self.rank)
        return group, position * self.rank

    def rank_of(self, heads: range) -> int:
        """Return the rank of some heads, which have the same."""
        return self.head_ranks[heads[0]] if self.head_ranks else self.rank


class _LoraLinear(torch.autograd.Function):
    """y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ − s·(x·A0ᵀ)·B0ᵀ + bias for H heads that share W; saves s·x·Aᵀ, and x if A is trained.

    A quantized W is dequantized in the forward and again in the backward pass, and freed at the end of each.

    Beside the frozen product, forward and backward to x cost 2 small products each and the factors' gradients 2 more:
    4P + 6P_adapter operations a row against the dense 6P. All of them add in place onto the frozen product. The old
    product, A0 and B0, costs up to 4P_adapter more. For heads with many rows it is cheaper to fold products into each
    head's weight (simulate.layers.folding).

    Under autocast all inputs are cast on entry, and the saved part of x with them. W is cast again in the backward
    pass, so that no second copy of it is kept.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, frozen_OI: Tensor | QuantizedWeight, bias_LO: Tensor | None, a_HRI: Tensor, b_HOR: Tensor,
        a0_HRI: Tensor | None, b0_HOR: Tensor | None, scale: float,
    ) -> Tensor:  # fmt: skip
        heads, _, inputs = a_HRI.shape
        outputs = frozen_OI.shape[0]
        x_HMI = x.to(product_dtype(x)).contiguous().view(heads, -1, inputs)
        rows = x_HMI.shape[1]
        product = _Product(x_HMI.dtype, dense(frozen_OI), a_HRI, b_HOR, a0_HRI, b0_HOR, scale)
        us_HMR = thin_product(x_HMI, product.a_HRI.mT, scale)
        y = x_HMI.new_empty(*x.shape[:-1], outputs)  # no view is returned, or nobody could write to it in place
        y_HMO = y.view(heads, rows, outputs)
        if bias_LO is not None:  # written first, so that the product adds to it without a separate pass
            y_HMO.view(bias_LO.shape[0], -1, outputs).copy_(bias_LO.unsqueeze(1))
        product.add(y_HMO, x_HMI, us_HMR, to_inputs=False, beta=0 if bias_LO is None else 1)
        del product
        plain_OI = frozen_OI if isinstance(frozen_OI, Tensor) else None
        # W has no gradient, and B's needs only x·Aᵀ, so x is saved for A's gradient alone.
        kept_HMI = x_HMI if ctx.needs_input_grad[3] else None
        ctx.save_for_backward(kept_HMI, us_HMR, plain_OI, a_HRI, b_HOR, a0_HRI, b0_HOR)
        # A module cannot be saved as a tensor. Only merges change it, and these happen between steps.
        ctx.quantized_OI = frozen_OI if plain_OI is None else None
        ctx.scale, ctx.num_bias, ctx.x_dtype = scale, 0 if bias_LO is None else bias_LO.shape[0], x.dtype
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_HMI, us_HMR, plain_OI, a_HRI, b_HOR, a0_HRI, b0_HOR = ctx.saved_tensors
        grad_y = grads[0].contiguous()  # copied once here, or else in each of the products
        g_HMO = grad_y.view(*us_HMR.shape[:2], -1)
        folds = folded_products(g_HMO.shape[1], g_HMO.shape[2], a_HRI.shape[2], a0_HRI is not None)
        vs_HMR = grad_x = None
        # Only A's gradient and a product that is not folded read s·g·B.
        if ctx.needs_input_grad[3] or (ctx.needs_input_grad[0] and not folds.new):
            vs_HMR = thin_product(g_HMO, b_HOR.to(g_HMO.dtype), ctx.scale)
        if ctx.needs_input_grad[0]:
            gx_HMI = us_HMR.new_empty(*us_HMR.shape[:2], a_HRI.shape[2])
            weight_OI = dense(plain_OI if ctx.quantized_OI is None else ctx.quantized_OI)
            product = _Product(us_HMR.dtype, weight_OI, a_HRI, b_HOR, a0_HRI, b0_HOR, ctx.scale)
            product.add(gx_HMI, g_HMO, vs_HMR, to_inputs=True, beta=0)
            del product, weight_OI
            grad_x = gx_HMI.view(*grad_y.shape[:-1], -1).to(ctx.x_dtype)
        rows_of_bias = g_HMO.view(ctx.num_bias, -1, g_HMO.shape[2]) if ctx.needs_input_grad[2] else None
        grad_bias = None if rows_of_bias is None else sum_of_rows(rows_of_bias).to(b_HOR.dtype)
        grad_a = None
        if ctx.needs_input_grad[3] and vs_HMR is not None:
            grad_a = torch.bmm(vs_HMR.transpose(1, 2), x_HMI).to(a_HRI.dtype)
        grad_b = torch.bmm(g_HMO.transpose(1, 2), us_HMR).to(b_HOR.dtype)
        return grad_x, None, grad_bias, grad_a, grad_b, None, None, None


class _Product:
    """Product of rows with every head's effective weight, or with its transpose.

    Both passes use it: the forward one with Y = I and X = O, the backward one to the inputs with Y = O and X = I.
    """

    def __init__(
        self, dtype: torch.dtype, weight_OI: Tensor, a_HRI: Tensor, b_HOR: Tensor, a0_HRI: Tensor | None,
        b0_HOR: Tensor | None, scale: float,
    ) -> None:  # fmt: skip
        # Tensors that have the dtype already are not copied.
        self.weight_OI, self.a_HRI, self.b_HOR = weight_OI.to(dtype), a_HRI.to(dtype), b_HOR.to(dtype)
        self.a0_HRI, self.b0_HOR = (None if old is None else old.to(dtype) for old in (a0_HRI, b0_HOR))
        self.scale = scale

    def add(self, out_HMX: Tensor, in_HMY: Tensor, small_HMR: Tensor | None, to_inputs: bool, beta: int) -> None:
        """Set out to beta·out + in·W + the heads' low-rank products.

        `small` is s·in·(first of the new factors); a folded new product does not read it.
        """
        folds = folded_products(in_HMY.shape[1], in_HMY.shape[2], out_HMX.shape[2], self.a0_HRI is not None)
        if folds.any:
            half = (len(out_HMX) + 1) // 2  # half of the heads at a time, to hold only half of their weights
            for heads in (slice(half), slice(half, None))[: len(out_HMX)]:  # a lone head has no second half
                weight_HOI = self._folded(heads, folds.old, folds.new)
                out_HMX[heads].baddbmm_(in_HMY[heads], weight_HOI if to_inputs else weight_HOI.mT, beta=beta)
                del weight_HOI
        else:
            weight_YX = self.weight_OI if to_inputs else self.weight_OI.t()
            out_HMX.flatten(0, 1).addmm_(in_HMY.flatten(0, 1), weight_YX, beta=beta)
        if not folds.new:
            assert small_HMR is not None
            out_HMX.baddbmm_(small_HMR, self.a_HRI if to_inputs else self.b_HOR.mT)
        if self.a0_HRI is not None and self.b0_HOR is not None and not folds.old:
            # Reset-less: what the last merge put into W is taken out of this head's product again.
            first, second = (self.b0_HOR, self.a0_HRI) if to_inputs else (self.a0_HRI.mT, self.b0_HOR.mT)
            out_HMX.baddbmm_(torch.bmm(in_HMY, first), second, alpha=-self.scale)

    def _folded(self, heads: slice, old: bool, new: bool) -> Tensor:
        """Return the weights of some heads with their low-rank products added, (heads, O, I)."""
        a_HRI, b_HOR = self.a_HRI[heads], self.b_HOR[heads]
        weight_HOI = self.weight_OI.repeat(len(a_HRI), 1, 1)
        if old:
            assert self.a0_HRI is not None and self.b0_HOR is not None
            weight_HOI.baddbmm_(self.b0_HOR[heads], self.a0_HRI[heads], alpha=-self.scale)
        if new:
            weight_HOI.baddbmm_(b_HOR, a_HRI, alpha=self.scale)
        return weight_HOI


class LoraLinear(nn.Module):
    """Linear layer with frozen W (a buffer, shared by all local devices) and one LoRA pair a head.

    The effective weight of head h is W + s·B_h·A_h; reset-less mode subtracts s·B0_h·A0_h, the product at the last
    merge. A starts orthogonal times sqrt(I/r), with one draw a head; B starts at 0 (arXiv 2402.16828, section 3).
    """

    def __init__(self, weight_OI: Tensor, bias_LO: Tensor | None, name: str, spec: AdapterSpec, devices: int) -> None:
        super().__init__()
        self.name, self.spec = name, spec
        heads, (outputs, inputs) = devices * spec.heads_per_device, weight_OI.shape
        self.draws = layer_draws(spec.draws, spec.total_rank, inputs)
        self.frozen = None if spec.quantize == "none" else QuantizedWeight(weight_OI, spec.quantize)
        if self.frozen is None:
            self.register_buffer("weight", weight_OI.detach())
        if isinstance(bias_LO, nn.Parameter) or bias_LO is None:
            self.bias = bias_LO
        else:
            self.register_buffer("bias", bias_LO)
        rank = spec.rank * spec.draws_per_head
        if self.draws == "columns":
            self.register_buffer("columns", torch.empty(heads, rank, dtype=torch.int64, device=weight_OI.device))
        elif spec.frozen_a:
            self.register_buffer("a", weight_OI.new_empty(heads, rank, inputs))
        else:
            self.a = nn.Parameter(weight_OI.new_empty(heads, rank, inputs))
        self.b = nn.Parameter(weight_OI.new_zeros(heads, outputs, rank))
        self.register_buffer("drawn_after", torch.tensor(0))
        self.redraw_a(0)
        self.register_buffer("a0", None)
        self.register_buffer("b0", None)
        # W0 never changes: with the old product subtracted, merges telescope to W = W0 + (s/H)·Σ B_h·A_h. Only merges
        # read it, so it is not a buffer: it stays in host memory when the module moves to a GPU.
        keep = mapped_copy if self.frozen else torch.clone
        self.start_weight = keep(weight_OI.detach().cpu()) if spec.reset_less and spec.keeps_start else None
        # Merges add to this copy and evaluation reads it: rounding to a quantized W would lose small updates.
        self.master = mapped_copy(weight_OI.detach().cpu()) if spec.keeps_master else None

    weight: Tensor
    """W, (O, I); quantized layers have `frozen` instead."""
    a0: Tensor | None
    b0: Tensor | None

    transposed = False
    """Whether the plain layer holds its weight as (I, O)."""
    head: int | None = None
    """The one head that the next pass is of; None: each head gets its share of the samples."""
    a: Tensor
    """A, (H, R, I); layers whose A picks columns have `columns` instead."""
    columns: Tensor
    """Inputs that the rows of A pick, (H, R)."""
    drawn_after: Tensor
    """Number of steps done when A was drawn."""

    def __getattr__(self, name: str) -> Any:
        """Return a quantized weight as a LazyWeight: networks read a layer's dtype and device from its weight."""
        held = self.__dict__.get("_modules", {}).get("frozen") if name == "weight" else None
        return super().__getattr__(name) if held is None else self.plain_weight_in_use(fold=False)

    def factors(self) -> Iterator[nn.Parameter]:
        """Yield the trained factors."""
        if not self.spec.frozen_a:
            assert isinstance(self.a, nn.Parameter)
            yield self.a
        yield self.b

    @torch.no_grad()
    def redraw_a(self, steps_done: int) -> None:
        """Replace A of the local heads by a fresh draw."""
        if self.draws == "columns":
            self.columns.copy_(self.draw_columns(steps_done).columns_HR)
        else:
            self.a.copy_(self.draw_a(steps_done))
        self.drawn_after.fill_(steps_done)

    def _drawn_heads(self, heads: int | range | None) -> range:
        """Return the global indices of the local heads, of so many heads of all devices, or of some heads."""
        if isinstance(heads, range):
            return heads
        first = 0 if heads else self.spec.first_local_head
        return range(first, first + (heads or len(self.b)) * self.spec.draws_per_head)

    def draw_a(self, steps_done: int, all_heads: int | range | None = None) -> Tensor:
        """Return a fresh A with orthogonal rows, for the local heads, for `all_heads` heads of all devices, or for some
        heads of one rank.

        Draws are addressed by (seed, layer, global head, steps done), so that every process draws the same A for a
        head. With joint draws, rows of different heads are orthogonal too, for as many heads as fit into I dimensions.
        """
        inputs, heads = self.size[1], self._drawn_heads(all_heads)
        rank = self.spec.rank_of(heads)
        if self.draws == "columns":
            return self.draw_columns(steps_done, all_heads).dense(self.b.detach())
        if self.draws == "joint":
            return self._draw_jointly(heads, steps_done)
        normal_HIR = torch.empty(len(heads), inputs, rank, dtype=torch.float64)
        for index, head in enumerate(heads):
            seed = address(self.spec.seed, "adapter", self.name, head, steps_done)
            normal_HIR[index].normal_(generator=torch.Generator().manual_seed(seed))
        q_HIR, r_HRR = torch.linalg.qr(normal_HIR)
        # Q is uniformly distributed only if R's diagonal is positive, which LAPACK does not ensure.
        q_HIR *= r_HRR.diagonal(dim1=1, dim2=2).sign().unsqueeze(1)
        rows = rank * self.spec.draws_per_head
        return (q_HIR.transpose(1, 2) * math.sqrt(inputs / rank)).reshape(-1, rows, inputs).to(self.a)

    def draw_columns(self, steps_done: int, all_heads: int | range | None = None) -> Columns:
        """Return fresh columns: each head takes r entries of a random order of the inputs, that heads share."""
        inputs, heads = self.size[1], self._drawn_heads(all_heads)
        rank, places = self.spec.rank_of(heads), [self.spec.place(head, inputs) for head in heads]
        sliced = self.spec.draws == "slices"
        order_of = slice_order if sliced else column_order
        orders = {
            group: order_of(generator(self.spec.seed, self.spec.draws, self.name, group, steps_done), inputs, rank)
            for group in range(places[0][0], places[-1][0] + 1)
        }
        picked = [orders[group][first:][:rank] for group, first in places]
        return Columns(torch.from_numpy(np.stack(picked)).to(self.b.device), inputs, sliced)

    def frozen_a(self, heads: int | range | None = None) -> Tensor | Columns:
        """Return the frozen A of the local heads, or drawn again: of all `heads` heads of all devices, or of some."""
        first = self.spec.first_local_head
        if heads in (None, len(self.b), range(first, first + len(self.b))):
            return self.factors_in_use()[0]
        draw = self.draw_columns if self.draws == "columns" else self.draw_a
        return draw(int(self.drawn_after), heads)

    def _draw_jointly(self, heads: range, steps_done: int) -> Tensor:
        """Return A of some heads: each takes r rows of a random orthogonal matrix, (I, I), that heads share.

        Q = Π·C·D·C·D·C·D with the Hartley transform C, random signs D and a random order of rows Π (after Yu et al.
        2016, arXiv 1610.09072, who use Hadamard's transform). A row costs I·log I operations and needs no other row, so
        that each process computes its own heads'.
        """
        rank, inputs = self.spec.rank_of(heads), self.size[1]
        drawn_HRI = self.a.new_empty(len(heads), rank, inputs)
        for index, head in enumerate(heads):
            group, first = self.spec.place(head, inputs)
            random = generator(self.spec.seed, "joint adapters", self.name, group, steps_done)
            rows_R = torch.from_numpy(random.permutation(inputs)[first : first + rank])
            q_RI = F.one_hot(rows_R, inputs).double()  # rows of Π; the loop multiplies C·D to them three times
            for _ in range(3):
                signs_I = torch.from_numpy(random.integers(0, 2, inputs) * 2.0 - 1.0)
                q_RI = hartley(q_RI).mul_(signs_I)
            drawn_HRI[index] = q_RI.mul_(math.sqrt(inputs / rank))
        return drawn_HRI

    def remember_product(self, a_HRI: Tensor, b_HOR: Tensor) -> None:
        """Store B·A as it was merged, so that later merges do not count it twice."""
        if self.a0 is None or self.b0 is None:
            self.a0, self.b0 = torch.empty_like(self.a), torch.empty_like(self.b)
        self.a0.copy_(a_HRI)
        self.b0.copy_(b_HOR)

    @property
    def size(self) -> tuple[int, int]:
        """Outputs and inputs, (O, I)."""
        held = self.frozen or self.weight
        return held.shape[0], held.shape[1]

    def merged_weight(self) -> Tensor:
        """Return W without adapters, (O, I), in the highest precision kept here; a new tensor if W is quantized."""
        if self.master is not None:
            # A copy also on a CPU: callers overwrite it, and runs on CPUs and GPUs shall take the same bytes.
            return self.master.to(self.b.device, copy=True)
        return dense(self.frozen or self.weight)

    @torch.no_grad()
    def set_weight(self, weight_OI: Tensor) -> None:
        """Store a merged W, quantized if the layer is."""
        if self.frozen is None:
            self.weight.copy_(weight_OI)
            return
        self.frozen.quantize(weight_OI)
        if self.master is not None:
            self.master.copy_(weight_OI)

    def frozen_tensors(self) -> list[Tensor]:
        """Return the tensors that hold W on the device."""
        return [self.weight] if self.frozen is None else self.frozen.tensors()

    def folded_weight(self) -> Tensor:
        """Return W + s·mean_h(B_h·A_h), (O, I): the mean of all heads' effective weights."""
        # The mean of products; the product of the factors' means would be another matrix.
        product_HOI = self.b.detach() @ self.a.detach()
        mean_OI = product_HOI.mean(0)
        del product_HOI  # H times a weight's size, freed before W is made
        weight_OI = self.merged_weight()
        # A quantized layer has made a new tensor, which may be overwritten.
        return torch.add(weight_OI, mean_OI, alpha=self.spec.scale, out=None if self.frozen is None else weight_OI)

    def factors_in_use(self) -> tuple[Tensor | Columns, Tensor]:
        """Return A and B of all heads."""
        if self.draws == "columns":
            return Columns(self.columns, self.size[1], self.spec.draws == "slices"), self.b
        return self.a, self.b

    def _pairs(self) -> tuple[Tensor | Columns, Tensor, Tensor | None, Tensor | None]:
        """Return A, B, A0 and B0 of the heads that the next pass is of."""
        tensors = (*self.factors_in_use(), self.a0, self.b0)
        if self.head is None:
            return tensors
        a, b, a0, b0 = tensors
        of_head = slice(self.head, self.head + 1)
        return a[of_head], b[of_head], None if a0 is None else a0[of_head], None if b0 is None else b0[of_head]

    def forward(self, x: Tensor) -> Tensor:
        held, scale = self.frozen or self.weight, self.spec.scale
        a, b_HOR, *old = self._pairs()
        if isinstance(a, Columns):
            y: Tensor = column_function(x, held, self.bias, a, b_HOR, scale)
        else:
            y = _LoraLinear.apply(x, held, self.bias, a, b_HOR, *old, scale)
        return y

    def weight_of_head(self) -> Tensor:
        """Return the effective weight of the only head, or of `head`, in the plain layer's form, with its gradient."""
        a, b_HOR, a0_HRI, b0_HOR = self._pairs()
        a_HRI = a.dense(b_HOR.detach()) if isinstance(a, Columns) else a
        weight_OI = torch.add(dense(self.frozen or self.weight), b_HOR[0] @ a_HRI[0], alpha=self.spec.scale)
        if a0_HRI is not None and b0_HOR is not None:
            weight_OI = torch.sub(weight_OI, b0_HOR[0] @ a0_HRI[0], alpha=self.spec.scale)
        return self._as_plain(weight_OI)

    def plain_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the plain layer's parameters other than its weight, with a copies axis."""
        if self.bias is not None:
            yield "bias", self.bias

    def plain_weight(self, fold: bool) -> Tensor:
        """Return the plain layer's weight; with `fold`, adapters included."""
        if fold:
            return self._as_plain(self.folded_weight())
        return self._as_plain(self.merged_weight() if self.spec.shows_master else dense(self.frozen or self.weight))

    def plain_weight_in_use(self, fold: bool) -> Tensor:
        """Return `plain_weight`, as a LazyWeight if it has to be computed, so that each product frees it again."""
        if self.frozen is None and not fold:
            return self.plain_weight(fold)
        held = self.frozen or self.weight
        form = self._as_plain(torch.empty(held.shape, dtype=held.dtype, device="meta"))
        return LazyWeight(partial(self.plain_weight, fold), form, held.device)

    def _as_plain(self, weight_OI: Tensor) -> Tensor:
        return weight_OI.t() if self.transposed else weight_OI


class LoraConv2d(LoraLinear):
    """Convolution as a linear layer over patches: A is a convolution to r channels, B a 1x1 convolution.

    W (O, C, Y, X) is held as (O, C*Y*X); activations are (S, C, Y, X) as for the plain layer. B is that of arXiv
    2402.16828, section 3.
    """

    def __init__(self, conv: nn.Conv2d, bias_LO: Tensor | None, name: str, spec: AdapterSpec, devices: int) -> None:
        super().__init__(conv.weight.detach().flatten(1), bias_LO, name, spec, devices)
        self.shape = conv.weight.shape
        self.kernel, self.stride, self.dilation = conv.kernel_size, conv.stride, conv.dilation
        assert not isinstance(conv.padding, str) and conv.groups == 1
        self.padding = conv.padding

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(x, self.kernel, self.dilation, self.padding, self.stride).transpose(1, 2)
        y_SPO = super().forward(patches)
        reach = self.dilation[0] * (self.kernel[0] - 1)
        height = (x.shape[2] + 2 * self.padding[0] - reach - 1) // self.stride[0] + 1  # as nn.Conv2d documents it
        return y_SPO.transpose(1, 2).unflatten(2, (height, -1))

    def _as_plain(self, weight_OI: Tensor) -> Tensor:
        return weight_OI.view(self.shape)


def hartley(x_XI: Tensor) -> Tensor:
    """Return the orthonormal Hartley transform of each row: Σ_j x_j·(cos + sin)(2πij/I) / sqrt(I)."""
    transformed_XI = torch.fft.fft(x_XI)
    return (transformed_XI.real - transformed_XI.imag).div_(math.sqrt(x_XI.shape[1]))


def lora_layers(model: nn.Module) -> list[LoraLinear]:
    """Return the adapted layers in the order of the network."""
    return [module for module in model.modules() if isinstance(module, LoraLinear)]
