"""Simulates several devices on one CPU: an operation on tensors of different devices raises, as between GPUs.

All tensors are CPU tensors, so kernels, autograd and values are real. The simulated device is kept for each
storage.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

HOST = torch.device("cpu")
ATEN = torch.ops.aten
# torch allows the indices, which are the second argument, to be on the host.
INDEXING = (ATEN.index.Tensor, ATEN.index_put.default, ATEN.index_put_.default, ATEN._index_put_impl_.default)


class Devices:
    """The device of every tensor: the host "cpu", or "cpu:1", "cpu:2" and so on.

    Inside `with devices.apart():` these are separate devices.
    """

    def __init__(self):
        self._places: dict[int, tuple[StorageWeakRef, torch.device]] = {}

    @contextmanager
    def apart(self):
        with ExitStack() as stack:
            stack.enter_context(_Arguments(self))
            stack.enter_context(_Operations(self))
            yield

    def of(self, t: Tensor) -> torch.device:
        found = self._places.get(t.untyped_storage()._cdata)
        return HOST if found is None else found[1]

    def put(self, t: Tensor, device: torch.device) -> Tensor:
        """Set the device of a tensor."""
        storage = t.untyped_storage()
        # The reference keeps the storage's address from being reused.
        self._places[storage._cdata] = (StorageWeakRef(storage), device)
        return t

    def move(self, t: Tensor, device: torch.device) -> Tensor:
        """Return the tensor itself if it lies on the device, else a copy there."""
        return t if self.of(t) == device else _Move.apply(t, self, device)

    def spread(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        rest: torch.device,
        places: Sequence[torch.device],
    ) -> None:
        """Place blocks on the devices in turn, and the rest of the model on `rest`.

        Modules move their arguments to their own device, as with accelerate.
        """
        where = {module: rest for module in model.modules()}
        where |= {
            module: places[i % len(places)] for i, block in enumerate(blocks) for module in block.modules()
        }
        for module, device in where.items():
            for t in (*module._parameters.values(), *module._buffers.values()):
                if t is not None:
                    self.put(t, device)
            module.forward = _fetching(module.forward, device, back=module is model)


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, devices: Devices, device: torch.device) -> Tensor:
        ctx.devices, ctx.source = devices, devices.of(t)
        return devices.put(t.clone(), device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.devices.put(grad.clone(), ctx.source), None, None


class _Arguments(TorchFunctionMode):
    """Makes `.device`, and functions that move or create tensors, use the simulated devices."""

    def __init__(self, devices: Devices):
        super().__init__()
        self.devices = devices

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func == Tensor.device.__get__:
            return self.devices.of(args[0])
        kwargs = dict(kwargs or {})
        device = kwargs.pop("device", None)
        if func is Tensor.cpu:
            device, func, args = HOST, Tensor.to, args[:1]
        if func is Tensor.to:
            args, device = self._plain(args, device)
        out = args[0] if func is Tensor.to and len(args) == 1 and not kwargs else func(*args, **kwargs)
        return out if device is None else self.devices.move(out, torch.device(device))

    def _plain(self, args: tuple, device: Any) -> tuple[tuple, Any]:
        """Return the arguments of `Tensor.to` without the device, and the device."""
        kept = list(args[:1])
        for arg in args[1:]:
            if isinstance(arg, (str, torch.device)):
                device = arg
            elif isinstance(arg, Tensor):
                device = self.devices.of(arg)
                kept.append(arg.dtype)
            else:
                kept.append(arg)
        return tuple(kept), device


class _Operations(TorchDispatchMode):
    """Checks that an operation's tensors lie on one device, and places its result there.

    Single numbers may lie on the host.
    """

    def __init__(self, devices: Devices):
        super().__init__()
        self.devices = devices

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        free = {id(t) for t in tree_leaves(args[1])} if func in INDEXING else set()
        if func.namespace == "pyglobenc":
            # By contract, cu_seqlens of packed sequences lie on the host.
            free = {id(t) for t in tensors if t.dtype == torch.int32}
        places = {
            place for t in tensors if (place := self.devices.of(t)) != HOST or (t.dim() and id(t) not in free)
        }
        if len(places) > 1 and func is not ATEN.copy_.default:
            raise RuntimeError(f"{func}: tensors on {' and '.join(sorted(map(str, places)))}")
        out = func(*args, **(kwargs or {}))
        if len(places) == 1 and HOST not in places:
            for t in tree_leaves(out):
                if isinstance(t, Tensor):
                    self.devices.put(t, *places)
        return out


def _fetching(forward: Callable, device: torch.device, back: bool) -> Callable:
    """Return a module's forward pass that moves its arguments to its device; back: the result moves back."""

    def moved(tree: Any, device: torch.device) -> Any:
        return tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, tree)

    @wraps(forward)
    def fetching(*args: Any, **kwargs: Any) -> Any:
        out = forward(*moved(args, device), **moved(kwargs, device))
        if not back:
            return out
        return moved(out, next(t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)).device)

    return fetching
