"""LoRA-the-Explorer (Huh et al. 2024, arXiv 2402.16828, algorithm 1).

Every head h trains A_h, B_h on its own data against frozen W. Every T steps the heads' products are averaged into W:

    reset:       W ← W + (s/H)·Σ_h B_h·A_h,   then B_h ← 0  (and, with reset = "ab", A_h drawn anew)
    reset-less:  W ← W + (s/H)·Σ_h (B_h·A_h − B0_h·A0_h),   then A0_h, B0_h ← A_h, B_h

Reset-less merges telescope, since each one takes back the last: W = W0 + (s/H)·Σ_h B_h·A_h with the start weights W0.
So W0 is kept instead of everybody's old factors; nothing accumulates, neither rounding nor memory. Parameters outside
adapted layers belong to a device and are averaged with every merge. Optimizer state stays with its device.

With `draws` = "joint" rows of A are orthogonal between heads, too, of as many as fit into the inputs I, so that

    (1/H)·Σ_h A_hᵀ·A_h = (I/(H·r))·P,   a projection on H·r directions, the identity where H·r = I

and merges look in every direction alike (as in orthogonal random features; Yu et al. 2016, arXiv 1610.09072). With
"columns" A's rows are those of a random order of the inputs, times sqrt(I/r), in the layers where H·r >= I, and joint
draws in the others: a head trains a slice of each weight (arXiv 2509.22418). With "slices" a head's inputs follow
one another.

With `merge_delay` d the factors of step kT, A' and B', are merged while the next d steps run; after step kT + d

    reset-less:                W ← W0 + (s/H)·Σ_h B'_h·A'_h,   then A0_h, B0_h ← A'_h, B'_h
    frozen A with reset = "b": W ← W + (s/H)·Σ_h B'_h·A_h,     then B_h ← B_h − B'_h

so that a head keeps what it learned in these steps. Other resets would drop that.

With `devices_per_node` the devices of a node hold the same A and B and average their gradients at every step, so that a
node trains as one device with all of its devices' samples would; merges are between nodes, and heads are theirs.

With `pace = "deadline"` device n counts w_n in place of 1/N (simulate.methods.paced):

    reset:       W ← W + s·Σ_n w_n·mean_{h of n}(B_h·A_h)

Reset-less merges would not telescope then: what a head had added with one weight would be taken back with another.

With a quorum devices that are late or lost have w_n = 0, and come back later (simulate.methods.quorum).

With `quantize` W is kept in fewer bytes, Q(W), and unpacked for each product; merges add to a full-precision master
W in host memory, and W0 lies there, too. Only with `master` = "none" does Q(Q(W) + ...) take the place of W.

On a compressed `wire` what a device merged is what its message said, so A0, B0 are the rounded factors, and what
rounding lost is added to the next message (error feedback; Karimireddy et al. 2019, arXiv 1901.09847). A reduced delta
carries the change since the last merge instead, through simulate.comm.compression's CompressedMean, and W accumulates.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from simulate.comm.base import Communicator, Exchanges, Nodes, first_devices
from simulate.comm.nodes import NodeExchanges
from simulate.comm.transfers import fragment
from simulate.common.errors import InputError, RunFailedError
from simulate.config.run import Run
from simulate.layers.convert import ConversionSpec, convert, lora, merged_state, norm_parameters
from simulate.layers.lora import AdapterSpec, LoraLinear, lora_layers
from simulate.layers.per_device import VectorLora
from simulate.methods.averaging import Averaging
from simulate.methods.base import Method
from simulate.methods.gradient_averaging import packed_parameters
from simulate.methods.lora.train import adapter_groups, adapter_parameters, masters
from simulate.methods.loss import gradients_of
from simulate.methods.lte.merge import LayerMerger
from simulate.methods.lte.options import LteOptions
from simulate.methods.round_updates import DenseUpdates, LayerUpdates, LowRankUpdates, dense_updates
from simulate.methods.stepper import ParameterGroup, clear_rows, clip_per_device
from simulate.optim.moments import forget_moments, prune_moments

PRUNED_SHARE = 0.9
"""Share of the adapters' optimizer state that a pruning merge zeroes (as in ReLoRA, arXiv 2307.05695)."""


class Lte(Method):
    """LTE with or without reset, over any transport."""

    def __init__(
        self, run: Run, communicator: Communicator, device: torch.device, network: nn.Module | None = None
    ) -> None:
        options = run.of_devices(communicator.local_devices).method
        assert isinstance(options, LteOptions)
        self.options = options
        self.nodes = Nodes(options.devices_per_node, options.num_nodes(communicator.num_devices))
        super().__init__(run, communicator, device, network)
        layers = lora_layers(self.model)
        self.vectors = {n: m for n, m in self.model.named_modules() if isinstance(m, VectorLora)}
        self.messages = packed_parameters(self.parameters)
        """Names of the parameters whose gradients a node's devices average in one message."""
        # Vectors' pairs are adapters to the optimizer, but a device's heads share them, like replicated parameters.
        adapters = {id(p) for p in adapter_parameters(self.model)}
        of_heads = {id(p) for layer in layers for p in layer.factors()}
        self.replicated_parameters = [p for p in self.parameters.values() if id(p) not in of_heads]
        norms = norm_parameters(self.model) if options.norms == "one" else {}
        self.first_device_norms = list(norms.values())
        averaged = {name: t for name, t in self._in_order(adapters).items() if name not in norms}
        server = options.merge_transport == "server"
        delayed, parts_of = options.merge_delay > 0, options.fragments
        fewest = run.cluster.fewest
        self.averaging = Averaging(
            averaged, self.between, server, options.wire, parts_of, delayed=delayed, fewest=fewest
        )
        self.spreading = Averaging(norms, self.between, server, fragments=parts_of, first_only=True, delayed=delayed)
        parts = [fragment(len(layers), options.fragments, index) for index in range(options.fragments)]
        self.mergers = [LayerMerger([layers[i] for i in part], options, self.between, fewest) for part in parts]

    def exchanges_between(self, communicator: Communicator) -> Exchanges:
        return communicator if self.nodes.size == 1 else NodeExchanges(communicator, self.nodes)

    @property
    def local_nodes(self) -> int:
        """Nodes that have devices here; devices that train alone count as one each."""
        return len(self.between.local_devices)

    def prepare(self, model: nn.Module) -> nn.Module:
        options, rows = self.options, self.local_nodes
        # Where the server merges, only its process needs W0 and the full-precision W.
        merges_here = options.master != "server" or self.communicator.process == 0
        spec = AdapterSpec(
            rank=options.rank,
            scale=options.scale,
            heads_per_device=options.heads_per_device,
            reset_less=options.reset == "none",
            first_device=self.between.local_devices.start,
            seed=self.run.train.seed,
            draws=options.draws,
            num_heads=self.run.heads,
            head_ranks=options.head_ranks,
            first_head=options.heads_of(self.between.local_devices).start,
            frozen_a=options.frozen_a,
            quantize=options.quantize,
            keeps_start=merges_here,
            keeps_master=options.keeps_master and merges_here,
            shows_master=options.master == "host",
        )
        layers = ConversionSpec(
            make_adapter=lora(spec, rows),
            make_vector=lambda vector: VectorLora(vector, rows, options.scale, options.reset == "none"),
            norms=options.norms,
            biases=options.biases,
            convolutions=options.convolutions,
        )
        return convert(model, rows, layers)

    def _in_order(self, adapters: set[int]) -> dict[str, Tensor]:
        """Return the parameters that merges average, vectors with a low-rank pair included, in the network's order."""
        averaged: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            owner = name.rpartition(".")[0]
            if owner in self.vectors:
                averaged[owner] = self.vectors[owner].merged
            elif id(parameter) not in adapters:
                averaged[name] = parameter
        return averaged

    def parameter_groups(self) -> list[ParameterGroup]:
        return adapter_groups(self, self.options)

    def step(self, inputs: Tensor, targets: Tensor, step: int) -> Tensor:
        heads = self.options.heads_per_device
        # The sum over heads gives each adapter the gradient of its own head's mean loss, whatever H is.
        losses_X = self.loss.backpropagate(self._by_heads(inputs), self._by_heads(targets), self.local_devices * heads)
        if heads > 1:  # parameters that a device's heads share get the mean of their gradients
            torch._foreach_div_(gradients_of(self.replicated_parameters), float(heads))
        for norm in self.first_device_norms:  # trained on the first device, for all
            first = 1 if self.between.local_devices.start == 0 else 0
            if norm.grad is not None:
                norm.grad[first:] = 0.0
        self._average_in_nodes()
        clip_per_device(gradients_of(self.model.parameters()), self.local_nodes, self.run.train.clip_norm)
        self.stepper.step(self.rate_factor(step))
        return losses_X.view(self.local_nodes, heads, -1).mean(1).flatten()

    def _by_heads(self, samples: Tensor) -> Tensor:
        """Return a batch, (L*B, ...), with the rows of a node's head side by side, where several devices share it."""
        heads, rows = self.options.heads_per_device, self.local_nodes
        if heads == 1 or rows == self.local_devices:
            return samples
        return samples.unflatten(0, (rows, self.local_devices // rows, heads, -1)).transpose(1, 2).flatten(0, 3)

    @torch.no_grad()
    def _average_in_nodes(self) -> None:
        """Give all devices of a node the mean of their gradients."""
        if self.nodes.size == 1:
            return
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        for names in self.messages:
            self.communicator.reduce_in_nodes([gradients[name] for name in names], self.nodes)
        torch._foreach_div_(list(gradients.values()), float(self.nodes.size))

    @torch.no_grad()
    def merge(self, step: int) -> None:
        for index in self.fragments_due(step):
            self._merge_fragment(index, step)
        self.healthy_N = None

    def _merge_fragment(self, index: int, step: int) -> None:
        merger = self.mergers[index]
        weights_N = self.shares()
        merger.merge(self._head_weights())
        # The averaging below takes means of effective vectors, not of factors.
        for vector in self.vectors.values():
            vector.merged.copy_(vector())
        self.averaging.merge(index, weights_N)
        self.spreading.merge(index)
        for layer in merger.layers:
            self._start_round(layer, step)
        for name in (name for message in self.averaging.messages[index] for name in message):
            if name in self.vectors:
                self.vectors[name].start_round()
                self._drop_moments(self.vectors[name].factors())

    def _head_weights(self) -> Tensor | None:
        """Return all devices' shares of the heads' merge, (N,); None where they count alike.

        But where steps are counted, they are the same in every merge: a device that is left out adds nothing to a mean
        over all heads, and a reset-less merge takes back what the last one added.
        """
        return self.shares() if self.weighs_devices else self.shares_of_samples()

    def send_fragment(self, index: int, step: int) -> None:
        self.mergers[index].send(self._head_weights())
        self.averaging.send(index, self.shares())
        self.spreading.send(index)

    def apply_merged_fragment(self, index: int) -> None:
        merger = self.mergers[index]
        merger.apply_merged()
        self.averaging.apply_merged(index)
        self.spreading.apply_merged(index)
        for layer in merger.layers:
            self._drop_moments(layer.factors())

    can_exclude_devices = True

    @torch.no_grad()
    def exclude_devices(self, healthy_N: Tensor) -> None:
        super().exclude_devices(healthy_N[:: self.nodes.size])
        if self.first_device_norms and not healthy_N[0]:
            raise RunFailedError("device 0, which trains the norms of all, has weights that are not finite")
        for merger in self.mergers:
            merger.exclude_devices(self.healthy_L)
        for vector in self.vectors.values():
            for factor, old in ((vector.a, vector.a0), (vector.b, vector.b0)):
                clear_rows(factor, self.healthy_L)
                if old is not None:
                    clear_rows(old, self.healthy_L)
            vector.a[~self.healthy_L.to(vector.a.device)] = 1.0  # its start: b = 0 makes it add nothing
        self.averaging.exclude_devices(self.healthy_L)

    def _start_round(self, layer: LoraLinear, step: int) -> None:
        if self.options.reset != "none":
            layer.b.zero_()
        if self.options.reset == "ab":
            layer.redraw_a(step + 1)
        self._drop_moments(layer.factors())

    def _drop_moments(self, factors: Iterable[nn.Parameter]) -> None:
        if self.options.merge_optimizer == "prune":
            prune_moments(self.stepper.state, factors, PRUNED_SHARE)
        elif self.options.merge_optimizer == "reset":
            forget_moments(self.stepper.state, factors)

    def keep_merged(self) -> None:
        self.averaging.keep_last()

    def updates(self, step: int) -> Iterator[LayerUpdates]:
        """Yield changes of heads, and of parameters that merges average; not of norms that device 0 trains for all."""
        for layer in lora_layers(self.model):
            yield LowRankUpdates.of(layer)
        for name, vector in self.vectors.items():
            yield DenseUpdates(name, vector(), vector.value[0], is_matrix=False)
        others = {name: p for name, p in self.averaging.parameters.items() if name not in self.vectors}
        yield from dense_updates(self.model, others, self.averaging.last)

    def merged_state(self) -> dict[str, Tensor]:
        return merged_state(self.model, self._last_averages())

    def weights_in_use(self) -> dict[str, Tensor]:
        return merged_state(self.model, self._last_averages(), in_use=True)

    def _last_averages(self) -> dict[int, Tensor]:
        averagings = (self.averaging, self.spreading)
        return {id(a.parameters[name]): tensor for a in averagings for name, tensor in a.last.items()}

    def base_state(self) -> dict[str, Tensor]:
        """Return W of adapted layers, as precise as it is kept, and the averages."""
        weights: dict[str, Tensor] = {}
        for layer in lora_layers(self.model):
            # What is packed is packed again from the full W, if there is one, to the same bits.
            kept = layer.frozen_tensors() if layer.master is None else [layer.master]
            weights |= {f"weight.{layer.name}.{index}": tensor for index, tensor in enumerate(kept)}
        return {**weights, **self.averaging.base_state()}

    @torch.no_grad()
    def load_base(self, base: Mapping[str, Tensor]) -> None:
        for layer in lora_layers(self.model):
            if layer.master is not None:
                layer.set_weight(base[f"weight.{layer.name}.0"].to(layer.b.device))
                continue
            for index, tensor in enumerate(layer.frozen_tensors()):
                tensor.copy_(base[f"weight.{layer.name}.{index}"])
        self.averaging.load_base(base)

    def extra_state(self) -> dict[str, Tensor]:
        starts = {
            f"{layer.name}.start_weight": layer.start_weight
            for merger in self.mergers
            for layer in merger.layers
            if layer.start_weight is not None
        }
        errors = {name: tensor for merger in self.mergers for name, tensor in merger.state_dict().items()}
        averages = {**self.averaging.state_dict(), **self.spreading.state_dict()}
        return {**super().extra_state(), **starts, **masters(self.model), **errors, **averages}

    def init_lost_device(
        self, shared: Mapping[str, Tensor], donor: Mapping[str, Tensor], device: int
    ) -> dict[str, Tensor]:
        """Return a lost device's start with new adapters: its own draw of A; B and the remembered product zero."""
        own = super().init_lost_device(shared, donor, device)
        node = device // self.nodes.size
        mine = self.options.heads_of(range(node, node + 1))
        for name, module in self.model.named_modules():
            key = "a"
            if isinstance(module, LoraLinear):
                drawn_after = int(shared[f"model.{name}.drawn_after"])
                if module.draws == "columns":
                    key, drawn = "columns", module.draw_columns(drawn_after, mine).columns_HR
                else:
                    drawn = module.draw_a(drawn_after, mine)
            elif isinstance(module, VectorLora):
                drawn = torch.ones_like(own[f"model.{name}.a"])
            else:
                continue
            for part, value in ((key, drawn), ("b", None), ("a0", drawn), ("b0", None)):
                for kept in (f"model.{name}.{part}", f"kept.snapshot.{name}.{part}"):
                    if kept in own:
                        own[kept] = torch.zeros_like(own[kept]) if value is None else value.to(own[kept])
        return own

    def is_devices_own(self, name: str) -> bool:
        """Whether a tensor is a device's own right after a merge: adapters are, unless merges draw them anew."""
        if super().is_devices_own(name) or self.options.reset == "ab":
            return super().is_devices_own(name)
        layer, _, key = name.removeprefix("model.").rpartition(".")
        adapted = {n for n, module in self.model.named_modules() if isinstance(module, LoraLinear)}
        return layer in adapted and key in ("a", "b", "a0", "b0", "columns")

    @torch.no_grad()
    def after_lost_devices_init(self) -> None:
        """Move lost devices' products from W into W0, since their adapters start again at zero."""
        travels = self.fragments_in_flight()
        for index, merger in enumerate(self.mergers):
            merger.weigh(self._head_weights())
            for layer in merger.layers:
                if self.options.reset == "none":
                    # W0 ← W − (s/H)·Σ_h B0_h·A0_h over the heads that are still there; lost ones' products are zero.
                    weight_OI, a_HRI, b_HOR = merger.merged(layer, travels=index in travels)
                    sums = [merger.own_sum(a_HRI, b_HOR)]
                    self.between.all_reduce(sums)
                    if layer.start_weight is not None:
                        layer.start_weight.copy_(torch.sub(weight_OI, sums[0], alpha=merger.sum_share))

    def _take_own_format(self, state: dict[str, Tensor]) -> None:
        """Give W this class's format, where a process of another class saved it: full weights are the same to all."""
        for layer in lora_layers(self.model):
            full = state.get(f"kept.{layer.name}.master", state.get(f"model.{layer.name}.weight"))
            if full is None:
                continue
            if layer.frozen is None:
                state.setdefault(f"model.{layer.name}.weight", full)
                continue
            own = {f"model.{layer.name}.frozen.{key}": tensor for key, tensor in layer.frozen.named_buffers()}
            if any(key not in state or state[key].shape != tensor.shape for key, tensor in own.items()):
                layer.frozen.quantize(full.to(layer.b))
                state.update({key: tensor.clone() for key, tensor in own.items()})
            if layer.master is not None:
                state.setdefault(f"kept.{layer.name}.master", full)

    def row_devices(self) -> list[int]:
        return first_devices(self.between.local_devices, self.nodes)

    def all_row_devices(self) -> list[int]:
        return first_devices(range(self.nodes.count), self.nodes)

    def before_loading(self, state: dict[str, Tensor]) -> None:
        """Make room for the products of old factors; raises InputError where the server's weights are elsewhere."""
        super().before_loading(state)
        if self.options.fleet:
            self._take_own_format(state)
        lacking = {f"kept.{name}" for name in self.extra_state()} - state.keys()
        if any(name.endswith((".start_weight", ".master")) for name in lacking):
            raise InputError(
                "method.master = 'server': this checkpoint lacks the weights in full precision, which the first "
                "process alone keeps; take the one in its node's folder"
            )
        for name, module in self.model.named_modules():
            if isinstance(module, LoraLinear) and f"model.{name}.a0" in state:
                # Makes room for what is copied in next.
                module.remember_product(state[f"model.{name}.a0"], state[f"model.{name}.b0"])
