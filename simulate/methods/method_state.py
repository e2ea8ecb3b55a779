"""The tensors from which a method continues, by name: collected, divided among devices, and restored.

Checkpoints and recovery points keep each device's tensors apart, so that other processes, with other devices in each,
can go on from them. The training loop, the launcher's recovery and `lte export` call it.

Names: model.NAME (parameters and buffers), optimizer.NAME.KEY (moments and step counters), loss_scale.KEY, and
kept.NAME (a method's own tensors).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from simulate.comm.base import Communicator
from simulate.config.run import Run
from simulate.layers.lora import LoraLinear
from simulate.layers.per_device import VectorLora
from simulate.methods.state import State
from simulate.methods.stepper import Stepper
from simulate.optim.loss_scale import LossScale

OWN = "class"
"""First word of the names of what a class alone has of the tensors that all devices share: class1.NAME."""


class Stateful(Protocol):
    """The parts of a method that its state is made of; the functions are explained in simulate.methods.base."""

    run: Run
    model: nn.Module
    parameters: dict[str, nn.Parameter]
    stepper: Stepper
    loss_scale: LossScale | None
    communicator: Communicator
    is_trained_per_device: bool

    @property
    def keeps_gradients_apart(self) -> bool: ...
    def extra_state(self) -> dict[str, Tensor]: ...
    def is_kept_per_device(self, name: str) -> bool: ...
    def row_devices(self) -> list[int]: ...
    def before_saving(self, state: dict[str, Tensor]) -> None: ...
    def before_loading(self, state: dict[str, Tensor]) -> None: ...


class MethodState:
    """Everything that a method's next step depends on."""

    def __init__(self, method: Stateful) -> None:
        self.method = method

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything that the next step depends on, by name."""
        method = self.method
        state = {f"model.{name}": tensor.detach() for name, tensor in self._model_tensors().items()}
        for name, parameter in method.parameters.items():
            for key, value in method.stepper.state.get(parameter, {}).items():
                state[f"optimizer.{name}.{key}"] = value
        state.update(self._scale_state())
        state.update({f"kept.{name}": tensor for name, tensor in method.extra_state().items()})
        method.before_saving(state)
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the tensors of `state_dict`; raises KeyError or RuntimeError where names or shapes differ."""
        method = self.method
        method.before_loading(state)
        for name, tensor in self._model_tensors().items():
            tensor.copy_(state[f"model.{name}"])
        for name, tensor in self._scale_state().items():
            tensor.copy_(state[name])
        for name, tensor in method.extra_state().items():
            tensor.copy_(state[f"kept.{name}"])
        for name, parameter in method.parameters.items():
            prefix = f"optimizer.{name}."
            moments = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            method.stepper.state.pop(parameter, None)  # a state without moments starts the optimizer anew
            if moments:
                # A fused optimizer keeps its step counter on the device, too.
                method.stepper.state[parameter] = {k: v.to(parameter.device).clone() for k, v in moments.items()}

    def sharded(self) -> State:
        """Return the state divided into what all devices share and what each local device has alone."""
        self.method.communicator.finish()  # tensors of a merge in flight must be complete
        owners, own = self.method.row_devices(), set(self.method.communicator.local_devices)
        divided = State(of_devices={device: {} for device in own})
        for name, tensor in self.state_dict().items():
            if not self.is_per_device(name):
                divided.shared[name] = tensor
                continue
            rows = tensor.shape[0] // len(owners)
            for device, part in zip(owners, tensor.split(rows), strict=True):
                if device in own:  # the copy of a node that reaches over processes is saved by its first device's
                    divided.of_devices[device][name] = part
        return divided

    def load_sharded(self, divided: State) -> None:
        """Restore the states of all devices that have rows here, from `sharded` of any processes."""
        # Names come from the state, not from this process: its own moments may not exist yet.
        joined, owners = self._shared_of_class(divided), self.method.row_devices()
        for name in divided.of_devices[owners[0]]:
            joined[name] = torch.cat([divided.of_devices[device][name] for device in owners])
        self.load_state_dict(joined)

    def _shared_of_class(self, divided: State) -> dict[str, Tensor]:
        """Return the shared tensors as this process's class of devices has them, where classes differ in them."""
        prefix = f"{OWN}{self.method.run.method.class_index}."
        others = {name: tensor for name, tensor in divided.shared.items() if not name.startswith(OWN)}
        return others | {n.removeprefix(prefix): t for n, t in divided.shared.items() if n.startswith(prefix)}

    def is_per_device(self, name: str) -> bool:
        """Whether a tensor of `state_dict` has a leading axis over `row_devices`; all devices share the others."""
        kind, _, rest = name.partition(".")
        if kind == "kept":
            return self.method.is_kept_per_device(rest)
        if kind == "loss_scale":
            return self.method.keeps_gradients_apart
        if kind == "optimizer":
            rest, _, key = rest.rpartition(".")
            return key != "step" and self.method.is_trained_per_device
        return rest in self._per_device_tensors

    @property
    def _per_device_tensors(self) -> set[str]:
        """The names of parameters and buffers with a leading axis over devices or their heads."""
        if not self.method.is_trained_per_device:
            return set()
        own = set(self.method.parameters)
        for name, module in self.method.model.named_modules():
            keys = ("a", "columns", "a0", "b0", "merged") if isinstance(module, LoraLinear | VectorLora) else ()
            own |= {f"{name}.{key}" for key in keys if isinstance(getattr(module, key, None), Tensor)}
        return own

    def _scale_state(self) -> dict[str, Tensor]:
        scale = {} if self.method.loss_scale is None else self.method.loss_scale.state_dict()
        return {f"loss_scale.{name}": tensor for name, tensor in scale.items()}

    def _model_tensors(self) -> dict[str, Tensor]:
        return {**self.method.parameters, **dict(self.method.model.named_buffers())}
