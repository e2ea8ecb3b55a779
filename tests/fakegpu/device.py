"""An accelerator made of Python: tensors on it have shapes and a device, and no numbers.

torch lets Python register a device, and FakeTensorMode works out what operations on it return. So every line that
trains on a GPU runs on a machine without one, and where a tensor of the CPU meets one of the device, torch raises as it
does on a GPU. Tensors of the CPU stay real: what is copied from the device is full of ones, and a number that is read
from it is one, too.

A process that has registered the device sees an accelerator from then on, and has to do so before its first backward
pass. So tests.fakegpu.rounds, the program of test_rounds, has a process of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "fakegpu"
NEEDS = "torch cannot register a device from Python: it lacks _setup_privateuseone_for_python_backend"
aten, prim_device = torch.ops.aten, torch.ops.prim.device.default
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


def can_register() -> bool:
    """Whether this torch has what `register` needs."""
    import torch.utils.backend_registration as registration

    return hasattr(registration, "_setup_privateuseone_for_python_backend")


class Stream:
    """A stream, which keeps the streams that it waited for."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.waited: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waited.append(other)


class DeviceModule:
    """Answers as torch.cuda does, for four devices with bf16."""

    def __init__(self) -> None:
        self.streams = [Stream()]
        """The streams in use, the current one last."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def device_count(self) -> int:
        return 4

    def current_device(self) -> int:
        return 0

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def is_bf16_supported(self, including_emulation: bool = True) -> bool:
        return True

    def mem_get_info(self, index: int) -> tuple[int, int]:
        return 10**10, 10**10

    def synchronize(self, device: torch.device) -> None:
        assert device.type == NAME

    held, peak = 10, 110

    def memory_allocated(self, device: torch.device) -> int:
        return self.held

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        assert device.type == NAME

    def max_memory_allocated(self, device: torch.device) -> int:
        return self.peak

    Stream = Stream

    def current_stream(self, device: torch.device) -> Stream:
        return self.streams[-1]

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self.streams.append(stream)
        yield
        self.streams.pop()


def register() -> DeviceModule:
    """Register the device in this process; returns its module."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    module = DeviceModule()
    _setup_privateuseone_for_python_backend(NAME, backend_module=module)
    _register_autocast()
    torch.tensor = _tensor
    nn.Module.to = _to_keeping_ties  # type: ignore[method-assign]
    return module


LOWER = (
    "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "addbmm", "conv2d", "convolution", "prelu", "einsum",
    "scaled_dot_product_attention",
)  # fmt: skip
HIGHER = ("layer_norm", "native_layer_norm", "rsqrt", "exp", "log", "pow", "softmax", "log_softmax", "nll_loss", "sum")
"""Operations that autocast on CUDA runs in the lower format and in fp32 (docs.pytorch.org/docs/stable/amp.html), those
of them that networks here can use."""
_libraries: list[torch.library.Library] = []
"""Registrations last as long as these objects."""


def _register_autocast() -> None:
    """Make autocast on the device choose formats as it does on CUDA."""
    library = torch.library.Library("_", "IMPL")
    library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    casts = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")
    _libraries.extend((library, casts))
    for names, lowers in ((LOWER, True), (HIGHER, False)):
        for packet in (getattr(aten, name) for name in names):
            for overload in packet.overloads():
                if "out" not in overload and "_" not in overload[:1] and overload != "str":
                    casts.impl(getattr(packet, overload), _with_casts(getattr(packet, overload), lowers))


def _with_casts(func: Any, lowers: bool) -> Any:
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def call(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype(NAME) if lowers else torch.float32

        def cast(value: Any) -> Any:
            castable = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
            return value.to(dtype) if castable and value.device.type == NAME else value

        with torch._C._ExcludeDispatchKeyGuard(key):
            return func(*tree_map(cast, args), **tree_map(cast, kwargs))

    return call


_to, _make = nn.Module.to, torch.tensor


def _tensor(data: Any, *, device: Any = None, **keywords: Any) -> Tensor:
    """Make a tensor of numbers as torch does, which allocates on the device where no mode sees it."""
    made = _make(data, **keywords)
    return made if device is None else made.to(device)


def _to_keeping_ties(module: nn.Module, *arguments: Any, **keywords: Any) -> nn.Module:
    """Move a module as torch does; layers go on sharing parameters, which a real device keeps as the same objects."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            places.setdefault(id(parameter), []).append((part, name))
    _to(module, *arguments, **keywords)
    for (first, key), *others in places.values():
        for part, name in others:
            setattr(part, name, getattr(first, key))
    return module


class OnTheDevice(TorchDispatchMode):
    """Makes tensors on the device fake and leaves all others real."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and torch's wrapper against it would double the time

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.operations = 0
        """Number of operations on the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is prim_device:  # half of all calls
            return args[0].fake_device
        kwargs = kwargs or {}
        target = kwargs.get("device")
        if FakeTensor not in types and not (target is not None and is_on_device(target)):
            return func(*args, **kwargs)
        self.operations += 1
        if func is aten._local_scalar_dense.default:
            return one_of(args[0].dtype)
        if func is aten.equal.default:
            assert_on_device(args)
            return True
        if func is aten.nonzero.default:
            return self._all_places(args[0])
        if func in INDEXED:
            args = (args[0], self._without_masks(args[0], args[1]), *args[2:])
        if func is aten.copy_.default and not isinstance(args[0], FakeTensor):
            return args[0].fill_(1)
        if any(map(_has_numbers, args)) or any(map(_has_numbers, kwargs.values())):
            args, kwargs = tree_map(self._without_numbers, (args, kwargs))
        key = _key_of(func, args, kwargs)
        recipes = KNOWN.get(key) if key is not None else None
        if recipes is not None:
            return self._made_again(recipes, args)
        # What its __torch_dispatch__ does, without entering and leaving the mode.
        result = self.fake.dispatch(func, types, args, kwargs)
        if key is not None and (recipes := _recipes_of(func, args, result)) is not None:
            KNOWN[key] = recipes
        if isinstance(result, FakeTensor):
            return _real(result)
        return tree_map(_real, result)

    def _made_again(self, recipes: Recipe | list[Recipe], args: Any) -> Any:
        """Return results as they were for arguments alike: a tenth of the work of finding out."""
        if isinstance(recipes, list):
            return [self._made_again(recipe, args) for recipe in recipes]
        if recipes is SAME:
            return args[0]
        shape, stride, dtype, offset, device = recipes
        if device.type != NAME:
            return torch.ones(shape, dtype=dtype)
        if offset is None:
            empty = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        else:
            empty = torch.empty(0, dtype=dtype, device="meta")
            with in_kernel_invocation_manager(self.fake):
                empty.set_(args[0].untyped_storage(), offset, shape, stride)
        return FakeTensor(self.fake, empty, device)

    def _without_numbers(self, value: Any) -> Any:
        # The mode would compute with a small tensor's numbers, on a device that has none.
        if _has_numbers(value):
            with self.fake:
                return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        return value

    def _all_places(self, mask: Tensor) -> Tensor:
        with self.fake:
            return torch.zeros(mask.numel(), mask.ndim, dtype=torch.int64, device=mask.device)

    def _without_masks(self, indexed: Tensor, indices: list[Tensor | None]) -> list[Tensor | None]:
        """Replace masks, which select numbers of rows that nobody knows, by indices of all."""
        found: list[Tensor | None] = []
        for index in indices:
            if index is None or index.dtype not in (torch.bool, torch.uint8):
                found.append(index)
            else:
                # As on a GPU: a mask may come from the CPU, one of another device may not.
                found += self._all_places(index.to(indexed.device)).unbind(1)
        return found


Recipe = Any
"""How to make a result: its shape, stride, format, its place in the storage of a view, and its device; or SAME."""
SAME = object()
"""The result is the first argument."""
KNOWN: dict[Any, Recipe | list[Recipe]] = {}
"""By a function and its arguments' shapes, strides, formats and devices: its results, once they passed all checks."""
UNLIKE = {aten.arange.default, aten.arange.start, aten.arange.start_step, aten.linspace.default}
"""Functions whose results depend on what `_key_of` leaves out."""


class _NoKeyError(Exception):
    """An argument is of a kind that results may depend on in other ways."""


def _key_of(func: Any, args: Any, kwargs: Any) -> Any:
    """Return what the shapes and formats of the results of an operation depend on; None where that is not known."""
    if func in UNLIKE:
        return None
    try:
        return func, _parts_of(args), tuple([(name, _parts_of(value)) for name, value in kwargs.items()])
    except _NoKeyError:
        return None


PLAIN = (int, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


def _parts_of(value: Any) -> Any:
    kind = type(value)
    if kind is FakeTensor:
        return value.shape, value.stride(), value.dtype, value.storage_offset(), value.fake_device
    if kind in (tuple, list):
        return tuple([_parts_of(item) for item in value])
    if kind is float:
        return float  # no shape depends on it, and learning rates are others at each step
    if kind not in PLAIN:
        raise _NoKeyError
    return kind, value


def _recipes_of(func: Any, args: Any, result: Any) -> Recipe | list[Recipe] | None:
    """Return how to make an operation's results once more; None where they are not all new, views, or the first."""
    if torch.Tag.inplace_view in func.tags:
        return None
    if isinstance(result, list | tuple):
        recipes = [_recipes_of(func, args, part) for part in result]
        return None if None in recipes else recipes
    if not isinstance(result, FakeTensor):
        return None
    if args and result is args[0]:
        return SAME
    aliases = [argument.alias_info for argument in func._schema.arguments]
    if func.is_view and aliases[0] is not None and aliases[1:] == [None] * (len(aliases) - 1):
        offset = result.storage_offset()
    elif not any(aliases):
        offset = None
    else:
        return None
    return tuple(result.shape), result.stride(), result.dtype, offset, result.fake_device


def _has_numbers(value: Any) -> bool:
    """Whether a value is, or holds, a tensor that is not fake."""
    if isinstance(value, list | tuple):
        return any(map(_has_numbers, value))
    return isinstance(value, Tensor) and not isinstance(value, FakeTensor)


def _real(value: Any) -> Any:
    """Return a fake tensor of the CPU as a real one, and all else as it is."""
    if isinstance(value, FakeTensor) and value.fake_device.type == "cpu":
        return torch.ones(value.shape, dtype=value.dtype)
    return value


def is_on_device(device: Any) -> bool:
    """Whether a device, or its name, is the one made of Python."""
    return torch.device(device).type == NAME


def assert_on_device(tensors: Any) -> None:
    """Raise where tensors are on several devices, for operations that the fake mode does not check."""
    places = {t.device for t in tree_leaves(tensors) if isinstance(t, Tensor)}
    if len(places) > 1:
        raise RuntimeError(f"tensors are on several devices: {sorted(map(str, places))}")


def one_of(dtype: torch.dtype) -> float | int | bool:
    """Return one as a number that a tensor of this dtype holds."""
    return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
