"""Run a stock transformers model once and keep what attribution needs of every layer."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pyglobenc.arguments import known_arguments
from pyglobenc.dtypes import HALF
from pyglobenc.hf.attention import NAME, PACKED, RECORDERS
from pyglobenc.hf.layers import LayerModules, LayerTrace, NormStats, outside
from pyglobenc.hf.own_attention import own_attention_hooks
from pyglobenc.hf.registry import find_layers
from pyglobenc.hf.unwrap import stock_model

NORMS = ("attention_norm", "output_norm", "added_norm")
FULL = (torch.float32, torch.float64)
_CLAIM = Lock()


class Trace:
    """Tensors of the last forward pass under `capture`."""

    def __init__(self, modules: list[LayerModules]):
        self._modules = modules
        self._calls: dict[tuple[str, nn.Module], int] = {}
        self._order: dict[tuple[str, nn.Module], list[int]] = defaultdict(list)
        for index, layer in enumerate(modules):
            for part in ("block", "attention", *NORMS):
                self._order[part, getattr(layer, part)].append(index)
        self.clear()

    def clear(self) -> None:
        """Forget the last forward pass."""
        self._calls = defaultdict(int)
        self._layers = [LayerTrace(layer) for layer in self._modules]
        self.io: dict[nn.Module, tuple[Tensor, Tensor]] = {}  # of the extra modules, input and output of the last call

    def next_layer(self, part: str, module: nn.Module) -> LayerTrace:
        """Layer that this call of a module belongs to: the k-th that has it, at its k-th call, since layers may share modules."""
        indices = self._order[part, module]
        index = indices[self._calls[part, module] % len(indices)]
        self._calls[part, module] += 1
        return self._layers[index]

    @property
    def layers(self) -> list[LayerTrace]:
        """Every layer's tensors, first to last.

        Raises:
            RuntimeError: no forward pass ran yet, or one that didn't go through the attention function of every layer.
        """
        if not self._calls:
            raise RuntimeError("capture: nothing captured; run the model's forward pass inside the context")
        missing = [index for index, layer in enumerate(self._layers) if layer.q is None]
        if missing:
            raise RuntimeError(
                f"capture: layers {missing} never called the attention function; the model ignores transformers' attention interface"
            )
        return self._layers


@known_arguments
@contextmanager
def capture(model: PreTrainedModel, modules: Iterable[nn.Module] = (), offsets: Tensor | None = None) -> Iterator[Trace]:
    """Capture the forward passes of a stock transformers model.

        with capture(model) as trace:
            output = model(**batch)
        trace.layers[0].q  # (B, H, n, dh)

    The model runs torch's fused attention, whatever attention implementation it is set to. On exit, also after an exception, every
    hook is removed and the model's own implementation restored. Tensors stay in the autograd graph when the forward pass records one.

    Args:
        model: a known architecture, in evaluation mode.
        modules: further modules whose input and output are kept, in `trace.io`.
        offsets: of S sequences packed into one, (S + 1,) int32, on the CPU: tokens offsets[s] to offsets[s + 1] attend to one another
            alone. The model must be given position_ids that start anew for each and an attention_mask of ones, without which some
            architectures make masks of their own. What it does after its layers, such as pooling, sees one sequence.

    Yields:
        Trace, filled by each forward pass; the next pass replaces what the last one left.

    Raises:
        TypeError: model is not a transformers model.
        ValueError: unknown architecture, the model is in training mode, or it computes attention itself and can't keep packed
            sequences apart.
        RuntimeError: the model is being captured already, by another thread too: one at a time can.
    """
    model = stock_model(model)
    found = find_layers(model)
    if model.training:
        raise ValueError("capture: the model is in training mode, where dropout changes the result; call model.eval() first")
    if offsets is not None and any(layer.own_scores is not None for layer in found):
        raise ValueError(f"capture: {type(model).__name__} computes attention itself and can't keep packed sequences apart")
    trace = Trace(found)
    with ExitStack() as stack:
        # before anything of the model is changed, and given back last: another thread may want the same one
        with _CLAIM:
            if any(layer.attention in RECORDERS for layer in found):
                raise RuntimeError("capture: the model is being captured already")
            for attention in {layer.attention for layer in found}:
                RECORDERS[attention] = _recorder(trace, attention)
                stack.callback(RECORDERS.pop, attention)
        stack.enter_context(_hooked(model, trace, found, modules))
        if offsets is not None:
            for attention in {layer.attention for layer in found}:
                PACKED[attention] = offsets
                stack.callback(PACKED.pop, attention)
        if any(layer.own_scores is None for layer in found):
            stack.enter_context(_attention_implementation(model, {layer.block for layer in found}))
        # a compiled model would run without its hooks
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield trace


@contextmanager
def _hooked(model: PreTrainedModel, trace: Trace, found: list[LayerModules], extra: Iterable[nn.Module]) -> Iterator[None]:
    handles, replaced = [], []
    try:
        handles += _hooks(model, trace, found, extra)
        for part, module in _norms(found):
            if type(module) is nn.LayerNorm and "forward" not in vars(module):
                # past nn.Module's own __setattr__, which takes ten times as long
                vars(module)["forward"] = _with_stats(trace, part, module)
                replaced.append(module)
            else:
                handles.append(module.register_forward_pre_hook(_keep_stats(trace, part)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in replaced:
            del vars(module)["forward"]


def _hooks(model: PreTrainedModel, trace: Trace, found: list[LayerModules], extra: Iterable[nn.Module]) -> Iterator[Any]:
    yield model.register_forward_pre_hook(lambda module, args: trace.clear())

    def keep_input(module: nn.Module, args: tuple, kwargs: dict) -> None:
        trace.next_layer("block", module).x = args[0] if args else kwargs["hidden_states"]

    for module in {layer.block for layer in found}:
        yield module.register_forward_pre_hook(keep_input, with_kwargs=True)
    yield from own_attention_hooks(found, RECORDERS)
    for module in extra:
        yield module.register_forward_hook(lambda module, args, output: trace.io.__setitem__(module, (args[0].to(output.device), output)))


def _norms(found: list[LayerModules]) -> Iterator[tuple[str, nn.Module]]:
    """Modules whose statistics are kept, each once, and the part they play."""
    for part in NORMS:
        for module in {getattr(layer, part) for layer in found} - {None}:
            # the norms before a pre-norm layer's parts change no attribution; an RMSNorm there isn't read
            if part == "added_norm" or isinstance(module, nn.LayerNorm):
                yield part, module


def _keep_stats(trace: Trace, part: str):
    def hook(module: nn.Module, args: tuple) -> None:
        trace.next_layer(part, module).norms[part] = _stats(args[0], module)

    return hook


def _with_stats(trace: Trace, part: str, module: nn.LayerNorm):
    """The module's forward pass, which also keeps the statistics that its kernel returns: a second kernel would read all of z again."""

    def forward(input: Tensor) -> Tensor:
        weight, device = module.weight, input.device.type
        # on a CPU statistics of half precision are of half precision too; what autocast or a mode widens is theirs to widen
        full = input.dtype in FULL or device == "cuda"
        if not full or weight is None or weight.dtype != input.dtype or torch.is_autocast_enabled(device):
            _keep_stats(trace, part)(module, (input,))
            return nn.LayerNorm.forward(module, input)
        out, mean, rstd = torch.native_layer_norm(input, module.normalized_shape, weight, module.bias, module.eps)
        trace.next_layer(part, module).norms[part] = NormStats(mean, rstd)
        return out

    return forward


def _recorder(trace: Trace, module: nn.Module):
    def record(**tensors: Any) -> None:
        layer = trace.next_layer("attention", module)
        for name, value in tensors.items():
            setattr(layer, name, value)
        # a block on another device than the one before it fetches its input inside its forward pass
        layer.x = layer.x.to(layer.q.device)

    return record


def _stats(z: Tensor, norm: nn.Module) -> NormStats:
    z = z.detach()
    if z.dtype in HALF:
        z = z.float()
    eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    if not isinstance(norm, nn.LayerNorm):
        return NormStats(None, (z.square().mean(-1, keepdim=True) + eps).rsqrt())
    # twenty times as fast as var_mean on a CPU
    return NormStats(*torch.native_layer_norm(z, z.shape[-1:], None, None, eps)[1:])


@contextmanager
def _attention_implementation(model: PreTrainedModel, blocks: set[nn.Module]) -> Iterator[None]:
    configs = {id(module.config): module.config for module in outside(model, blocks) if isinstance(module, PreTrainedModel)}
    saved = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for config, _ in saved:
            config._attn_implementation = NAME
        yield
    finally:
        for config, name in saved:
            config._attn_implementation = name
