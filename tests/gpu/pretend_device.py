"""A pretend GPU in pure Python: tensors that claim another device and compute on the CPU, with real values.

torch lets Python register a device (`PrivateUse1`); a wrapper subclass holds CPU data under its name. What a GPU would
refuse, tensors of two devices in one operation, raises. What makes the host wait for a GPU is counted with its place in
the code: reading a value back, and copying from memory that is not pinned. Autocast does nothing here.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

NAME = "pretend"
aten = torch.ops.aten
# The host learns a size or a value from each of these.
WAITING = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.equal,
           aten.is_nonzero, aten.unique_consecutive}  # fmt: skip
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
_torch_tensor, _pin_memory, _is_pinned = torch.tensor, torch.Tensor.pin_memory, torch.Tensor.is_pinned
_active: list[Session] = []


@dataclass
class Session:
    """What happened on the device: blocking transfers by (what, file:line), and copies that nobody waited for."""

    blocking: Counter[tuple[str, str]] = field(default_factory=Counter)
    num_async: int = 0
    operations: set[str] = field(default_factory=set)
    pinned: dict[int, torch.Tensor] = field(default_factory=dict)  # by address; kept, so that none is given out again

    def wait(self, what: str) -> None:
        self.blocking[what, place()] += 1

    @property
    def num_blocking(self) -> int:
        return self.blocking.total()

    def listing(self) -> str:
        """One line for each place, most frequent first."""
        lines = [f"{count:5} {what:28} {where}" for (what, where), count in self.blocking.most_common()]
        return "\n".join([f"{self.num_blocking} blocking transfers:", *lines])


def place() -> str:
    """file:line of the innermost frames of b3 and of other libraries than torch."""
    frame: Any = sys._getframe(1)
    places: list[str] = []
    while frame is not None and len(places) < 2:
        file = Path(frame.f_code.co_filename)
        is_ours = "b3" in file.parts and "tests" not in file.parts and "site-packages" not in file.parts
        if is_ours or "transformers" in file.parts or "peft" in file.parts or file.name.startswith("test_"):
            places.append(f"{'/'.join(file.parts[-3:])}:{frame.f_lineno}")
            if is_ours:
                break
        frame = frame.f_back
    return " < ".join(places)


def is_on_device(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


class Pretend(torch.Tensor):
    """A tensor that says it is on the device; `data_on_host` is what it holds."""

    data_on_host: torch.Tensor

    @staticmethod
    def __new__(cls, data: torch.Tensor) -> Any:
        make: Any = torch.Tensor._make_wrapper_subclass
        return make(
            cls, data.size(), strides=data.stride(), storage_offset=data.storage_offset(), dtype=data.dtype,
            device=f"{NAME}:0", requires_grad=False,
        )  # fmt: skip

    def __init__(self, data: torch.Tensor) -> None:
        self.data_on_host = data

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Pretend({self.data_on_host})"

    def tolist(self) -> Any:
        _active[-1].wait("read back (tolist)")
        return self.data_on_host.tolist()

    def numpy(self, *args: Any, **options: Any) -> Any:
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy")

    def __array__(self, *args: Any, **options: Any) -> Any:
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _on_host(value: Any) -> Any:
    return value.data_on_host if isinstance(value, Pretend) else value


def _cast(func: Any, args: Any, kwargs: Any) -> Any:
    """`aten.to` in its forms, whose kernels look at the storage."""
    source, device, dtype = args[0], kwargs.get("device"), kwargs.get("dtype")
    for value in args[1:]:
        if isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, (torch.device, str)):
            device = value
    is_same_device = device is None or is_on_device(device) == isinstance(source, Pretend)
    if is_same_device and dtype in (None, source.dtype):
        return source
    options = {"dtype": dtype, "device": None if device is None else torch.device(device)}
    options["non_blocking"] = kwargs.get("non_blocking") or None
    return _copy(source, {k: v for k, v in options.items() if v is not None})


def _copy(source: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """`aten._to_copy`."""
    session, device = _active[-1], options.get("device")
    to_device = is_on_device(device) if device is not None else isinstance(source, Pretend)
    if isinstance(source, Pretend) and not to_device:
        session.wait("copy to host")
    elif to_device and not isinstance(source, Pretend):
        if options.get("non_blocking") and source.untyped_storage().data_ptr() in session.pinned:
            session.num_async += 1
        else:
            session.wait("copy of unpinned memory")
    options = {k: v for k, v in options.items() if k not in ("device", "pin_memory", "non_blocking")}
    copied = aten._to_copy.default(_on_host(source), **options)
    return Pretend(copied) if to_device else copied


def _check_devices(func: Any, args: Any, leaves: list[Any]) -> None:
    """Raise if an operation on the device reads a tensor of the host; a number (0-d) may come from there."""
    strangers = [a for a in leaves if isinstance(a, torch.Tensor) and not isinstance(a, Pretend) and a.dim() > 0]
    if func.overloadpacket in INDEXING:
        indices = [i for i in args[1] if i is not None]
        for index in indices:
            if not isinstance(index, Pretend):
                _active[-1].wait("index on the host")
            if index.dtype in (torch.bool, torch.uint8):
                _active[-1].wait("boolean index")
        strangers = [a for a in strangers if not any(a is index for index in indices)]
    if strangers:
        shapes = [tuple(a.shape) for a in strangers]
        raise RuntimeError(f"{func}: tensors on {NAME}:0 and on cpu {shapes} at {place()}")


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    packet, device = func.overloadpacket, kwargs.get("device")
    if packet is aten.to:
        return _cast(func, args, kwargs)
    if packet is aten._to_copy:
        return _copy(args[0], kwargs)
    _active[-1].operations.add(packet.__name__)
    leaves = tree_leaves((args, kwargs))
    is_device_operation = any(isinstance(a, Pretend) for a in leaves)
    if packet is aten.copy_:
        if isinstance(args[0], Pretend) != isinstance(args[1], Pretend):
            _active[-1].wait("copy_ between devices")
    elif is_device_operation:
        _check_devices(func, args, leaves)
        if packet in WAITING or (func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None):
            _active[-1].wait(f"read back ({packet.__name__})")
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    kwargs.pop("pin_memory", None)
    result = func(*tree_map(_on_host, args), **tree_map(_on_host, kwargs))
    stays = is_on_device(device) or (device is None and is_device_operation)
    if packet is aten._local_scalar_dense or not stays:
        return result
    wrapped = tree_map(lambda t: Pretend(t) if isinstance(t, torch.Tensor) else t, result)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if is_device_operation else wrapped


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if is_on_device(kwargs.get("device")) or any(isinstance(a, Pretend) for a in tree_leaves((args, kwargs))):
            return _run(func, args, kwargs)
        if kwargs.pop("pin_memory", False):
            return _pinned(func(*args, **kwargs))
        return func(*args, **kwargs)


def _pinned(tensor: torch.Tensor, device: Any = None) -> torch.Tensor:
    """A copy in memory that counts as pinned."""
    copied = tensor.clone()
    _active[-1].pinned[copied.untyped_storage().data_ptr()] = copied
    return copied


def _tensor(data: Any, *, dtype: Any = None, device: Any = None, **options: Any) -> torch.Tensor:
    """`torch.tensor`, which does not dispatch."""
    if isinstance(data, list):
        data = [value.item() if isinstance(value, Pretend) else value for value in data]
    tensor = _torch_tensor(data, dtype=dtype, **options)
    return _copy(tensor, {"device": device}) if is_on_device(device) else tensor


def _register() -> None:
    """Make torch know the device, once a process and before its first backward pass. Skips if torch cannot."""
    try:
        from torch.utils import backend_registration as registration

        class Module(registration._DummyBackendModule):  # type: ignore[name-defined, misc]
            def get_amp_supported_dtype(self) -> list[torch.dtype]:
                return [torch.bfloat16]

        registration._setup_privateuseone_for_python_backend(NAME, Module())
    except (ImportError, AttributeError, TypeError) as error:
        pytest.skip(
            f"torch {torch.__version__} registers no device from Python, as torch 2.13 does (experimental): {error}",
            allow_module_level=True,
        )


@contextlib.contextmanager
def pretend_device() -> Iterator[Session]:
    """Within, `torch.device("pretend")` is a device; gives what happened on it."""
    session = Session()
    changed: list[tuple[Any, str, Any]] = [
        (torch, "tensor", _tensor),
        (torch, "inference_mode", lambda mode=True: torch.no_grad() if mode else contextlib.nullcontext()),
        (torch.Tensor, "pin_memory", _pinned),
        (torch.Tensor, "is_pinned", lambda t: t.untyped_storage().data_ptr() in session.pinned),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changed]
    _active.append(session)
    try:
        for owner, name, value in changed:
            setattr(owner, name, value)
        with _Mode():
            yield session
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
        _active.pop()


def move(root: torch.nn.Module) -> None:
    """Put a module's parameters and buffers on the device, in place; shared ones stay shared."""
    moved: dict[int, tuple[torch.nn.Parameter, Any]] = {}
    for module in root.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                copied = torch.nn.Parameter(Pretend(parameter.detach().clone()), parameter.requires_grad)
                module._parameters[name] = moved.setdefault(id(parameter), (copied, parameter))[0]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = Pretend(buffer.clone())


def host(tensor: torch.Tensor) -> torch.Tensor:
    """What a tensor of either device holds; not counted."""
    held: torch.Tensor = _on_host(tensor)
    return held.detach()


_register()
