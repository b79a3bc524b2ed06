"""Runs a stock transformers model once, and keeps the tensors of every layer that attribution needs."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from pyglobenc.common.arguments import known_arguments
from pyglobenc.hf.registry import find_layers
from pyglobenc.hf.trace.attention import NAME, RECORDERS, Recorder, recording
from pyglobenc.hf.trace.checks import (
    LINEAR,
    LinearCall,
    attended_weight,
    check_layers,
    check_still,
    describe,
    linear_call,
    shares_memory,
)
from pyglobenc.hf.trace.layers import LayerModules, LayerTrace, NormStats, outside
from pyglobenc.hf.trace.norms import is_stock, layer_norm_stats, norm_parts, rms_stats
from pyglobenc.hf.trace.own_attention import own_attention_hooks
from pyglobenc.hf.trace.projections import Directions
from pyglobenc.hf.trace.threads import attention_in_this_thread, in_this_thread, uncompiled
from pyglobenc.hf.unwrap import called_module, stock_model
from pyglobenc.hf.weights import runs_as_torchs

NORMS = ("attention_norm", "output_norm", "added_norm")
# These modules are observed when they are called.
PARTS = ("block", "attention", "output", "intermediate", "mlp_output", *NORMS)
FULL = (torch.float32, torch.float64)


class Trace:
    """The tensors of the last forward pass under `capture`.

    Attributes:
        twice: True if the second half of the batch, or of the packed tokens, is perturbed. It isn't checked.
    """

    def __init__(self, called: nn.Module, modules: list[LayerModules]):
        self.called, self.modules, self.twice = called, modules, False
        # the layers in which each module plays a part
        self._order: dict[tuple[str, nn.Module], list[int]] = defaultdict(list)
        for index, layer in enumerate(modules):
            for part in PARTS:
                self._order[part, getattr(layer, part)].append(index)
        self.clear()

    def ran_on(self, batch: Mapping[str, Any]) -> None:
        """Note that the model ran on a batch: each layer should have run, and hidden the batch's padding."""
        self._ran, self._mask = True, batch.get("attention_mask")

    def clear(self) -> None:
        """Forget the last forward pass."""
        self._ran, self._mask = False, None
        self._blocks_run: list[int] = []  # indices of the layers, in the order in which their blocks ran
        self.directions = Directions()
        self._layers = [LayerTrace(layer, directions=self.directions) for layer in self.modules]
        self._running: int | None = None  # index of the layer whose block was called last
        self._blocks: dict[nn.Module, int] = defaultdict(int)  # number of calls of each block in this pass
        self._io: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}
        self._calls: dict[nn.Module, LinearCall | None] = {}  # of Linear modules
        self._checked = False

    def start_layer(self, block: nn.Module) -> LayerTrace:
        """Return the layer that this call of a block belongs to.

        Layers may share a block. Its k-th call belongs to the k-th layer that has it.
        """
        indices = self._order["block", block]
        self._running = indices[self._blocks[block] % len(indices)]
        self._blocks[block] += 1
        self._blocks_run.append(self._running)
        layer = self._layers[self._running]
        layer.calls["block"] += 1
        return layer

    def layer_of(self, part: str, module: nn.Module) -> LayerTrace:
        """Return the layer that this call of a module belongs to: the layer whose block is running."""
        indices = self._order[part, module]
        layer = self._layers[self._running if self._running in indices else indices[0]]
        layer.calls[part] += 1
        return layer

    def keep_output(self, output: Tensor) -> None:
        """Keep the projection of the last layer's output (B, n, d)."""
        if self._running == len(self._layers) - 1:
            self._layers[-1].keep("block", output, length=True)

    def keep_io(self, module: nn.Module, given: Tensor, returned: Tensor) -> None:
        """Keep the input and the output of an extra module's call."""
        pieces = self._io.setdefault(module, [])
        if ("intermediate", module) not in self._order and ("mlp_output", module) not in self._order:
            pieces.clear()
        pieces.append((given, returned))

    def keep_call(self, module: nn.Module, given: Tensor, returned: Tensor) -> None:
        """Keep a record of a Linear module's call, (B, n, features) each; of a second call None."""
        again = module in self._calls
        self._calls[module] = None if again else linear_call(module, given, returned, self.directions)

    @property
    def io(self) -> dict[nn.Module, tuple[Tensor, Tensor]]:
        """Input and output of each extra module, from its last call.

        A layer's MLP may process the tokens in pieces. Its tensors are then those of all calls, joined.
        """
        return {
            module: pieces[0]
            if len(pieces) == 1
            else tuple(torch.cat(t, 1) for t in zip(*pieces, strict=True))
            for module, pieces in self._io.items()
        }

    @property
    def inputs(self) -> list[Tensor]:
        """Inputs (B, n, d) of the layers that were called so far; the checks have not run yet."""
        return [layer.x for layer in self._layers if layer.x is not None]

    @property
    def layers(self) -> list[LayerTrace]:
        """Tensors of every layer, first to last; reading them runs the checks once for each forward pass.

        Raises:
            RuntimeError: no forward pass ran yet.
            ValueError: a layer didn't run, or didn't call the attention function; or it computed something
                else than the attribution decomposes, see `check_layers`.
        """
        if not self._ran and not any(layer.calls for layer in self._layers):
            raise RuntimeError("capture: nothing captured; run the model's forward pass inside the context")
        missing = [index for index, layer in enumerate(self._layers) if layer.q is None]
        if missing:
            block = describe(self.called, self.modules[missing[0]].block)
            raise ValueError(
                f"capture: layers {missing} never called the attention function: {block} was skipped, or "
                "its attention ignores transformers' attention interface"
            )
        if not self._checked:
            check_layers(
                self.called, self._layers, self.io, self._calls, self._blocks_run, self._mask, self.twice
            )
            self._checked = True
        return self._layers


@known_arguments
@contextmanager
def capture(
    model: PreTrainedModel,
    modules: Iterable[nn.Module] = (),
    cu_seqlens: Tensor | None = None,
    attention: str = NAME,
) -> Iterator[Trace]:
    """Capture the forward passes of a stock transformers model.

        with capture(model) as trace:
            output = model(**batch)
        trace.layers[0].q  # (B, H, n, dh)

    The model runs torch's fused attention, whatever its own attention implementation is. Other threads that
    call the model meanwhile run it uncaptured. On exit, also after an exception, every hook is removed.
    Captured tensors stay in the autograd graph if the forward pass records one.

    Args:
        model: a model of a known architecture, in evaluation mode; or a wrapper that `called_module` accepts.
        modules: further modules, whose input and output are kept in `trace.io`.
        cu_seqlens: (S + 1,) int32, on the CPU, for S sequences packed into one. Tokens cu_seqlens[s] to
            cu_seqlens[s + 1] attend only to one another. The model then needs position_ids that start anew
            for each sequence. It also needs an attention_mask of ones, because some architectures otherwise
            make masks of their own. Steps after the layers, such as pooling, see a single sequence.
        attention: name under which transformers knows the attention function. That function must report each
            call to its module's recorder in RECORDERS.

    Yields:
        Trace, filled by each forward pass. A new pass replaces the tensors of the last one.

    Raises:
        TypeError: the model is not a transformers model.
        ValueError: the architecture is unknown, dropout is active, or a norm after a residual sum isn't a
            layer norm; or cu_seqlens is given and the model computes attention itself.
        RuntimeError: this or another thread already captures the model, or one that shares layers with it.
    """
    called, model = called_module(model), stock_model(model)
    many = isinstance(modules, Iterable) and not isinstance(modules, Tensor)
    modules = list(modules) if many else [modules]
    if not all(isinstance(module, nn.Module) for module in modules):
        raise TypeError(f"capture: modules must be torch modules, got {modules!r:.80}")
    if attention not in AttentionInterface().valid_keys():
        raise ValueError(f"capture: transformers knows no attention function {attention!r:.80}")
    found = find_layers(model)
    check_still(called)
    if cu_seqlens is not None and any(layer.own_scores is not None for layer in found):
        raise ValueError(
            f"capture: {type(model).__name__} computes attention itself and can't keep packed sequences apart"
        )
    trace = Trace(called, found)
    _keep_freed_memory()
    with ExitStack() as stack:
        # The capture claims the model before it changes anything, and releases it last, because another
        # thread may want to capture the same model.
        modules_called = {layer.attention for layer in found}
        stack.enter_context(
            recording({module: Recorder(_record(trace, module), cu_seqlens) for module in modules_called})
        )
        stack.enter_context(_hooked(called, trace, found, modules))
        if any(layer.own_scores is None for layer in found):
            stack.enter_context(attention_in_this_thread(attention_configs(model, found), attention))
        stack.enter_context(uncompiled())
        yield trace


@cache
def _keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next call.

    A call frees the tensors of all layers together. glibc returns such a block to the system if it exceeds a
    threshold, and the next call then waits until the system has cleared every page again. In MiniLM this took
    3 ms of 55 at 128 tokens. glibc raises its threshold to twice the largest block, up to 32 MB, that was
    freed.
    """
    torch.empty((32 << 20) - 8192, dtype=torch.uint8, device="cpu")


@contextmanager
def _hooked(
    called: nn.Module, trace: Trace, found: list[LayerModules], extra: Iterable[nn.Module]
) -> Iterator[None]:
    handles: list[Any] = []
    try:
        handles += _hooks(called, trace, found, extra)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hooks(
    called: nn.Module, trace: Trace, found: list[LayerModules], extra: Iterable[nn.Module]
) -> Iterator[Any]:
    def keep_input(module: nn.Module, args: tuple, kwargs: dict) -> None:
        trace.start_layer(module).x = args[0] if args else kwargs["hidden_states"]

    def keep_output(module: nn.Module, args: tuple, output: Any) -> None:
        trace.keep_output(output if isinstance(output, Tensor) else output[0])

    def keep_mlp(module: nn.Module, args: tuple, output: Tensor) -> None:
        trace.layer_of("mlp_output", module).keep("mlp_output", output)

    def keep_attended(module: nn.Module, args: tuple, output: Tensor) -> None:
        layer = trace.layer_of("output", module)
        layer.keep("output", output, weight=attended_weight(layer.modules))
        if not layer.writes or not shares_memory(args[0], layer.o):
            layer.keep("output given", args[0], length=True)

    def keep_io(module: nn.Module, args: tuple, output: Tensor) -> None:
        given = args[0].to(output.device)
        trace.keep_io(module, given, output)
        if module in plain:
            trace.keep_call(module, given, output)

    linear, extra = {getattr(layer, part) for layer in found for part in LINEAR}, list(extra)
    # before any hook of these is registered
    plain = {module for module in extra if module in linear and runs_as_torchs(module)}
    yield called.register_forward_pre_hook(in_this_thread(lambda module, args: trace.clear()))
    for module in {layer.block for layer in found}:
        yield module.register_forward_pre_hook(in_this_thread(keep_input), with_kwargs=True)
    yield found[-1].block.register_forward_hook(in_this_thread(keep_output))
    if not found[-1].pre_norm:
        for module in {layer.mlp_output for layer in found}:
            yield _after(module, keep_mlp)
    for module in {layer.output for layer in found if layer.own_scores is None}:
        # For any other module the checks apply its matrix themselves, so no output is needed.
        if runs_as_torchs(module):
            yield _after(module, keep_attended)
    yield from own_attention_hooks(found, RECORDERS)
    for module in extra:
        yield _after(module, keep_io)
    for part, module in _norms(found):
        if is_stock(module) and "forward" not in vars(module):
            yield Replaced(module, _with_stats(trace, part, module))
        else:
            yield module.register_forward_hook(in_this_thread(_norm_hook(trace, part)), with_kwargs=True)


class Replaced:
    """A forward pass in the place of a module's own. Like a hook's handle, it can be removed.

    torch calls it several times faster than a hook, which is noticeable beside the layers of a short text.
    """

    def __init__(self, module: nn.Module, forward: Callable[..., Any]):
        self._module = module
        # Assigning through `vars` avoids `nn.Module.__setattr__`, which is about ten times slower.
        vars(module)["forward"] = forward

    def remove(self) -> None:
        """Give the module its own forward pass back."""
        del vars(self._module)["forward"]


def _after(module: nn.Module, keep: Callable[[nn.Module, tuple, Any], None]) -> Any:
    """Let keep(module, args, output) follow each call of a module in this thread; return a handle."""
    if not runs_as_torchs(module):
        return module.register_forward_hook(in_this_thread(keep))
    thread, own = get_ident(), module.forward

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        output = own(*args, **kwargs)
        if get_ident() == thread:
            keep(module, (*args, *kwargs.values()), output)
        return output

    return Replaced(module, forward)


def _norms(found: list[LayerModules]) -> Iterator[tuple[str, nn.Module]]:
    """Yield each norm whose input is needed, once, with the part it plays."""
    for part in NORMS:
        for module in {getattr(layer, part): layer for layer in found if getattr(layer, part) is not None}:
            # The norm before a pre-norm layer's attention changes no attribution. The error estimate reads
            # its statistics if it is a LayerNorm.
            if part != "attention_norm" or not found[0].pre_norm or isinstance(module, nn.LayerNorm):
                yield part, module


def _with_stats(trace: Trace, part: str, module: nn.LayerNorm):
    """Return a forward pass for the module that also keeps the mean and rstd of its input.

    torch's kernel returns them. A second kernel would read all of the input z again.
    """
    thread = get_ident()

    def forward(input: Tensor) -> Tensor:
        if get_ident() != thread:
            return nn.LayerNorm.forward(module, input)
        weight, device = module.weight, input.device.type
        # On a CPU the kernel returns statistics in half precision for inputs in half precision. Where
        # autocast or a mode changes the dtypes, the module's own forward pass must run.
        full = input.dtype in FULL or device == "cuda"
        if (
            not full
            or (weight is not None and weight.dtype != input.dtype)
            or torch.is_autocast_enabled(device)
        ):
            out, stats = nn.LayerNorm.forward(module, input), layer_norm_stats(input, module.eps)
        else:
            out, *stats = torch.native_layer_norm(
                input, module.normalized_shape, weight, module.bias, module.eps
            )
        _keep_norm(trace.layer_of(part, module), part, input, out, NormStats.of(*stats))
        return out

    return forward


def _norm_hook(trace: Trace, part: str):
    """Return a hook for a norm that is not torch's own, or whose forward pass has been replaced already."""

    def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        layer, z = trace.layer_of(part, module), args[0] if args else next(iter(kwargs.values()))
        if part == "added_norm":
            layer.add_stats(part, NormStats.of(None, rms_stats(z, module)))
        elif not layer.modules.pre_norm:
            # The norm's parts are estimated from its outputs; the checks compare them with this call.
            try:
                parts = layer.parts[part] = norm_parts(module, z.shape[-1])
            except ValueError as error:
                name = describe(trace.called, module)
                raise ValueError(
                    f"capture: {name} doesn't compute a layer norm, which GlobEnc and LRP assume: {error}"
                ) from None
            _keep_norm(layer, part, z, output, NormStats.of(*layer_norm_stats(z, parts.eps)))
            layer.keep(f"{part} weighted", z, weight=parts.weight)
        elif isinstance(module, nn.LayerNorm):
            _keep_norm(layer, part, z, output, NormStats.of(*layer_norm_stats(z, module.eps)))
        else:
            layer.keep(part, z, length=True)

    return hook


def _keep_norm(layer: LayerTrace, part: str, z: Tensor, y: Tensor, stats: NormStats) -> None:
    """Keep a layer norm's statistics, and the projections of its input and output that are checked."""
    layer.add_stats(part, stats)
    if not layer.modules.pre_norm:
        layer.keep(part, z)
        layer.keep(f"{part} returned", y, length=part == "attention_norm")
    elif part == "output_norm":
        layer.keep(part, z, length=True)


def _record(trace: Trace, module: nn.Module):
    def record(**tensors: Any) -> None:
        layer = trace.layer_of("attention", module)
        for name, value in tensors.items():
            setattr(layer, name, value)
        if not layer.o.is_inference():
            layer.writes = {name: getattr(layer, name)._version for name in ("q", "k", "v", "o")}
        # A block on another device than the block before it moves its input inside its forward pass.
        layer.x = layer.x.to(layer.q.device)

    return record


def attention_configs(model: PreTrainedModel, found: list[LayerModules]) -> list[PreTrainedConfig]:
    """Return the configs from which the parts of a model choose their masks and attention.

    Layers may come from another model and then have a config of their own.
    """
    models = [
        module
        for module in outside(model, {layer.block for layer in found})
        if isinstance(module, PreTrainedModel)
    ]
    return [
        module.config
        for module in (*models, *(layer.attention for layer in found))
        if hasattr(module, "config")
    ]
