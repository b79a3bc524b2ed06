"""Checks on every call that the layers computed what the attribution decomposes.

An architecture is recognised by its name, but a user's model may differ from the stock one through adapters,
hooks or replaced modules. The checks therefore compare the tensors that the model computed with the formulas
that the decomposition assumes. Both sides are projected on one fixed direction u:

    tensor                            expected value
    the residual sum, z . u           x . u + (o W_O + b) . u
    the sum after the MLP, z2 . u     y . u + mlp . u  (post-norm layers)
    the layer's output, x' . u        the output of its last norm, along u  (post-norm layers)
    a norm of another class, y . u    (weight * (z - mean) * rstd + bias) . u

Relevance is propagated through each Linear module separately. When these modules' inputs and outputs are
captured, each module is compared too:

    tensor                            expected value
    the module's output               W x + b
    the input of q, k and v           x, or in a pre-norm layer the norm of x
    the input of W_O                  the attention output o
    the input of the MLP              y, or in a pre-norm layer the norm of z
    the outputs of q, k and v         the queries, keys and values that the attention function received
    the output of the MLP             what the layer adds to the residual stream

The output of W_O is read from the module if it is torch's own Linear layer and runs without hooks. Reading
the matrix again would cost a tenth of the forward pass on a short text. For any other module the matrix is
applied: o . (W_O u) + b . u.

Two vectors that differ by more than rounding almost surely differ along u too. Each tensor is projected while
its layer runs, so the checks keep no tensor alive. The comparisons of all layers are made together, with one
wait for the device.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyglobenc.common.deferred import require
from pyglobenc.hf.trace.layers import LayerModules, LayerTrace, outside
from pyglobenc.hf.trace.projections import Directions, Projection, wide
from pyglobenc.hf.weights import dense_bias, dense_weight, parameter, rounding_of, same_versions, versions

InputsOutputs = Mapping[nn.Module, tuple[Tensor, Tensor]]
Comparison = tuple[Tensor, Tensor, Callable[[nn.Module, LayerTrace], str]]

# Relevance is propagated through these Linear modules.
LINEAR = ("query", "key", "value", "output", "intermediate", "mlp_output")

# Each comparison sums a few rounded vectors. The factor covers several rounding units of each of them and the
# largest of a million Gaussian values.
MARGIN = 4


def check_still(called: nn.Module) -> None:
    """Check that no module of a model acts at random.

    Raises:
        ValueError: the model is in training mode, or a part of it is and has a dropout rate above 0.
    """
    if called.training:
        raise ValueError(
            "capture: the model is in training mode, where dropout changes the result; call model.eval() "
            "first"
        )
    for module in outside(called, ()):
        if module.training and (rate := _drop_rate(module)):
            raise ValueError(
                f"capture: {describe(called, module)} is in training mode, where its {rate} changes the "
                "result at random; call model.eval() first"
            )


def _drop_rate(module: nn.Module) -> str | None:
    """Return a module's dropout rate above 0 as "name=value"; torch's modules call it p, others drop_prob."""
    rates = {name: value for name, value in vars(module).items() if name == "p" or "drop" in name}
    return next(
        (f"{name}={value}" for name, value in rates.items() if isinstance(value, int | float) and value > 0),
        None,
    )


def describe(called: nn.Module, module: nn.Module) -> str:
    """Return the path and the class of a module inside a model, as error messages name it."""
    path = next((name for name, found in called.named_modules() if found is module), "")
    return f"{path} ({type(module).__name__})" if path else type(module).__name__


class LinearCall(NamedTuple):
    """One call of a Linear module that ran torch's own forward pass."""

    given: Tensor  # (B, n), the input along u
    returned: Tensor  # (B, n), the output along u
    parameters: list[tuple[Tensor, int]]  # as `versions` returned them


def linear_call(
    module: nn.Module, given: Tensor, returned: Tensor, directions: Directions
) -> LinearCall | None:
    """Return a record of a module's call, or None if torch can't tell later whether the weights changed.

    Args:
        module: a module for which `runs_as_torchs` holds.
        given: its input (B, n, inputs).
        returned: its output (B, n, outputs).
        directions: those of the layers.
    """
    parameters = versions(module)
    if parameters is None:
        return None
    given, returned = (directions.project(t).product for t in (given, returned))
    return LinearCall(given, returned, parameters)


def shares_memory(given: Tensor, o: Tensor) -> bool:
    """Return whether a tensor (B, n, H * dh) is the attention output o (B, H, n, dh) itself, by token."""
    tokens = o.transpose(1, 2)
    return (
        given.data_ptr() == o.data_ptr()
        and given.dtype == o.dtype
        and given.is_contiguous()
        and tokens.is_contiguous()
        and given.shape == tokens.flatten(2).shape
    )


class _Once:
    """Projects each tensor once, with the lengths of its tokens, however many comparisons read it."""

    def __init__(self, directions: Directions):
        self._directions = directions
        self._kept: dict[int, tuple[Tensor, Projection]] = {}

    def __call__(self, t: Tensor) -> Projection:
        """Return the projection of t, (B, n, d), or (B, H, n, dh) by head."""
        if id(t) not in self._kept:
            # The tensor is kept too: another one may get its id once it is gone.
            self._kept[id(t)] = t, self._directions.project(t, length=True)
        return self._kept[id(t)][1]


def check_layers(
    called: nn.Module,
    layers: Sequence[LayerTrace],
    io: InputsOutputs,
    calls: Mapping[nn.Module, LinearCall | None],
    order: Sequence[int],
    mask: Tensor | None = None,
    twice: bool = False,
) -> None:
    """Check that every layer of a forward pass computed what the attribution decomposes.

    Args:
        called: the module whose forward pass was captured. Errors name its parts.
        layers: the captured layers, first to last.
        io: input and output of further modules, each (B, n, features). If every Linear module of the layers
            is among them, each one is checked separately.
        calls: the calls of those Linear modules that ran torch's own forward pass once. Their product with
            the weights isn't computed again. Instead the weights, the input and the output must still be
            those of the call.
        order: indices of the layers, in the order in which they ran.
        mask: the attention_mask (B, n) that the model was called with, or None if it is unknown.
        twice: whether the second half of the examples, or of the packed tokens, was perturbed. The layers
            are the same for both halves, so only the first half is compared.

    Raises:
        ValueError: a layer computed something else; the error names the module.
    """
    _check_calls(called, layers, order)
    _check_masks(called, layers, mask)
    with torch.no_grad():
        once = _Once(layers[0].directions)
        compared = list(_comparisons(called, layers, once))
        if io and all(getattr(layer.modules, part) in io for layer in layers for part in LINEAR):
            compared += _module_comparisons(layers, io, calls, once)
        # The layers may be on several devices.
        place = compared[0][0].device
        differences, allowed = (torch.stack([one[i].to(place) for one in compared]) for i in (0, 1))
        holds = ~(differences.abs() > allowed)  # (C, L, B, n)
        real = layers[0].key_mask
        if real is not None:
            # Padding rows may hold any values.
            holds |= ~real.to(holds.device)
        if twice:
            holds = holds.chunk(2, 2 if layers[0].cu_seqlens is None else 3)[0]

    def error() -> ValueError:
        which, index = (~holds).flatten(2).any(2).nonzero()[0].tolist()
        return ValueError(f"capture: {compared[which][2](called, layers[index])}")

    require(holds.all(), error)


def _check_masks(called: nn.Module, layers: Sequence[LayerTrace], mask: Tensor | None) -> None:
    """Check that every layer hides the padding that the attention_mask names, and no other tokens."""
    # A multiple choice model takes (B, choices, n). A module of the user's may add or drop tokens itself.
    mask = None if mask is None else mask.flatten(0, -2)
    if mask is None or mask.shape != layers[0].x.shape[:2]:
        mask = layers[0].key_mask
    for layer in {id(layer.key_mask): layer for layer in reversed(layers)}.values():
        # Without a mask all tokens are seen.
        given = [one.bool() for one in (layer.key_mask, mask) if one is not None]
        if not given:
            continue
        require(
            given[0].all() if len(given) == 1 else (given[0] == given[1].to(given[0].device)).all(),
            lambda layer=layer: ValueError(
                f"capture: {describe(called, layer.modules.attention)} doesn't hide the padding that "
                "attention_mask names, or hides other tokens; pass the mask on to every layer, or give one "
                "text at a time"
            ),
        )


def _check_calls(called: nn.Module, layers: Sequence[LayerTrace], order: Sequence[int]) -> None:
    for layer in layers:
        for part in ("block", "attention"):
            if layer.calls[part] != 1:
                raise ValueError(
                    f"capture: {describe(called, getattr(layer.modules, part))} was called "
                    f"{layer.calls[part]} times for one layer in one forward pass; a forward pass may call "
                    "the encoder only once, so pass several texts as one batch or one after the other"
                )
        tokens = layer.x.shape[:2]
        for name, projection in layer.projections.items():
            if projection.product.shape != tokens:
                module = getattr(layer.modules, name.split()[0])
                raise ValueError(
                    f"capture: {describe(called, module)} was applied to {tuple(projection.product.shape)} "
                    f"tokens in one forward pass, but its layer has {tuple(tokens)}"
                )
        for part, stats in layer.norms.items():
            if stats.rstd.shape != tokens:
                module = getattr(layer.modules, part)
                raise ValueError(
                    f"capture: {describe(called, module)} has statistics of shape "
                    f"{tuple(stats.rstd.shape)}, not one for each of the {tuple(tokens)} tokens"
                )
    for index, ran in enumerate(order):
        if index != ran:
            expected, found = (describe(called, layers[i].modules.block) for i in (index, ran))
            raise ValueError(
                f"capture: {found} ran in the place of {expected}; the layers must run in the order in which "
                "the model holds them"
            )


def _comparisons(called: nn.Module, layers: Sequence[LayerTrace], once: _Once) -> Iterator[Comparison]:
    """Yield differences and the rounding that each may have, (L, B, n) each, with the text of its error."""
    post, x, eps = not layers[0].modules.pre_norm, [once(layer.x) for layer in layers], _eps(layers)
    after = [layer.projections["attention_norm" if post else "output_norm"] for layer in layers]
    attended = [_attended(called, layer) for layer in layers]
    sums, inputs, outputs = _by_layer(_products(after), _products(x), attended)
    (sizes,) = _by_layer(_lengths(x))
    after_sizes, *above_sizes = _norm_lengths(layers) if post else _by_layer(_lengths(after))
    allowed = eps * (sizes + after_sizes)
    if layers[0].modules.own_scores is not None:
        # The attention of such a module is computed twice. A softmax of scores of size s has an error of
        # about s rounding units.
        (scores,) = _by_layer([layer.lse.abs().amax(1).nan_to_num(posinf=0.0) for layer in layers])
        allowed = allowed * (1 + scores)
    yield sums - inputs - outputs, allowed, _not_the_sum
    if any("output given" in layer.projections or _written_to(layer) for layer in layers):
        given = (_given_difference(layer, once) for layer in layers)
        differences, sizes = _by_layer(*zip(*given, strict=True))
        yield differences, eps * sizes, _not_the_sum
    if post:
        yield from _mlp_comparisons(layers, x, eps, *above_sizes)


def _mlp_comparisons(
    layers: Sequence[LayerTrace], x: Sequence[Projection], eps: float, sizes: Tensor
) -> Iterator[Comparison]:
    """Yield the comparisons above the attention of post-norm layers, as `_comparisons` does.

    Args:
        layers, x: the layers, and the projections of their inputs.
        eps: the relative error that a comparison may have.
        sizes: (L, B, n), the lengths of the sums after the MLP.
    """
    above = [*x[1:], layers[-1].projections["block"]]
    y, mlp, z, out = (
        [layer.projections[name] for layer in layers]
        for name in ("attention_norm returned", "mlp_output", "output_norm", "output_norm returned")
    )
    normed, added, sums, outputs, inputs = _by_layer(*map(_products, (y, mlp, z, out, above)))
    normed_sizes, input_sizes = _by_layer(_lengths(y), _lengths(above))
    yield sums - normed - added, eps * (normed_sizes + sizes), _not_the_sum_after_the_mlp
    yield inputs - outputs, eps * input_sizes, _not_the_output
    for part in ("attention_norm", "output_norm"):
        if any(part in layer.parts for layer in layers):
            differences, allowed = _by_layer(
                *zip(*(_norm_difference(layer, part) for layer in layers), strict=True)
            )
            yield (
                differences,
                eps * allowed,
                lambda called, layer, part=part: _not_a_layer_norm(called, layer, part),
            )


def _by_layer(*columns: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Stack columns of one tensor (B, n) for each of L layers, (L, B, n) each, on the first one's device."""
    home = columns[0][0].device
    return tuple(torch.stack([t.to(home) for t in column]) for column in columns)


def _products(column: Sequence[Projection]) -> list[Tensor]:
    return [one.product for one in column]


def _lengths(column: Sequence[Projection]) -> list[Tensor]:
    return [one.length for one in column]


def _norm_lengths(layers: Sequence[LayerTrace]) -> tuple[Tensor, ...]:
    """Return the L2 lengths of the inputs of both norms of post-norm layers, (L, B, n) each."""
    stats = [layer.norms[name] for name in ("attention_norm", "output_norm") for layer in layers]
    mean, rstd = _by_layer([one.mean for one in stats], [one.rstd for one in stats])
    return ((mean.square() + rstd.pow(-2)).sqrt() * layers[0].x.shape[2] ** 0.5).chunk(2)


def _module_comparisons(
    layers: Sequence[LayerTrace], io: InputsOutputs, calls: Mapping[nn.Module, LinearCall], once: _Once
) -> Iterator[Comparison]:
    """Yield the comparisons of each Linear module's output and input, as `_comparisons` does."""
    eps = _eps(layers)

    def compare(text: str, part: str, pairs: Iterator[tuple[Tensor, Tensor]]) -> Comparison:
        differences, sizes = _by_layer(*zip(*pairs, strict=True))
        return differences, eps * sizes, lambda called, layer: _not_the_module(called, layer, part, text)

    for part in LINEAR:
        yield compare(
            "return W x + b", part, (_linear_difference(layer, part, io, calls, once) for layer in layers)
        )
        if part != "mlp_output":
            yield compare(
                "receive the output of the module before it",
                part,
                (_input_difference(layer, part, io, once) for layer in layers),
            )
        if part in ("query", "key", "value"):
            yield compare(
                "pass its output to the attention function",
                part,
                (_head_difference(layer, part, io, once) for layer in layers),
            )
    if layers[0].modules.pre_norm:
        yield compare("pass its output to its layer", "mlp_output", _output_differences(layers, io, once))


def _distance(one: Projection, other: Projection) -> tuple[Tensor, Tensor]:
    """Return the difference of two tensors (B, n, d) along u, and the length of the first, (B, n) each."""
    return one.product - other.product.to(one.product.device), one.length


def _linear_difference(
    layer: LayerTrace, part: str, io: InputsOutputs, calls: Mapping[nn.Module, LinearCall], once: _Once
) -> tuple[Tensor, Tensor]:
    module = getattr(layer.modules, part)
    out, call = once(io[module][1]), calls.get(module)
    if call is not None and same_versions(call.parameters, module):
        given = once(io[module][0])
        changed = (given.product - call.given).abs() + (out.product - call.returned).abs()
        return changed, given.length + out.length
    x = wide(io[module][0])
    weight = dense_weight(module, x.shape[2]).to(x.dtype)
    u = layer.directions.of(weight)
    w, bias = (weight @ u).to(x.device), dense_bias(module, x.shape[2])
    expected = x @ w if bias is None else x @ w + (bias.to(x.dtype) @ u).to(x.device)
    # The terms have random signs and may cancel, so the size is not that of their sum.
    size = torch.linalg.vector_norm(x, dim=-1) * torch.linalg.vector_norm(w) / len(w) ** 0.5
    return out.product - expected.to(out.product.device), out.length + size.to(out.length.device)


def _input_difference(layer: LayerTrace, part: str, io: InputsOutputs, once: _Once) -> tuple[Tensor, Tensor]:
    """Return the difference between a Linear module's input and the output of the module before it."""
    m, given = layer.modules, once(io[getattr(layer.modules, part)][0])
    if part == "output":
        return _distance(given, once(layer.o))
    if m.pre_norm:
        norm = "output_norm" if part == "intermediate" else "attention_norm"
        z = layer.x if part != "intermediate" else layer.x + io[m.output][1].to(layer.x.device)
        along = layer.directions.project(z, weight=layer.norm_weight(norm)).product
        expected, size = _layer_norm(layer, norm, along)
        return given.product.to(expected.device) - expected, given.length.to(size.device) + size
    if part != "intermediate":
        return _distance(given, once(layer.x))
    return _distance(given, layer.projections["attention_norm returned"])


def _head_difference(layer: LayerTrace, part: str, io: InputsOutputs, once: _Once) -> tuple[Tensor, Tensor]:
    heads = {"query": layer.q, "key": layer.k, "value": layer.v}[part]
    return _distance(once(heads), once(io[getattr(layer.modules, part)][1]))


def _output_differences(
    layers: Sequence[LayerTrace], io: InputsOutputs, once: _Once
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each pre-norm layer's output minus the residual sum and the MLP's output, along u."""
    above = [*(once(layer.x) for layer in layers[1:]), layers[-1].projections["block"]]
    for layer, x in zip(layers, above, strict=True):
        z, mlp = layer.projections["output_norm"], once(io[layer.modules.mlp_output][1])
        expected = z.product + mlp.product.to(z.product.device)
        yield x.product - expected.to(x.product.device), x.length + z.length.to(x.length.device)


def _eps(layers: Sequence[LayerTrace]) -> float:
    """Return the relative error that a comparison may have, once the tensors were projected.

    It covers the rounding of the stored tensors, of the products, and of sums over d numbers.
    """
    stored = [layers[0].directions.eps]
    stored += [_product_eps(*kind) for kind in {(layer.o.device.type, layer.o.dtype) for layer in layers}]
    stored += [rounding_of(module) for module in {layer.modules.output for layer in layers}]
    if any(layer.modules.added_norm is not None for layer in layers):
        # An RMSNorm computes in float32, whatever the model's dtype is.
        stored.append(torch.finfo(torch.float32).eps)
    double = all(layer.q.dtype == torch.float64 for layer in layers)
    summed = torch.finfo(torch.float64 if double else torch.float32).eps
    return MARGIN * (max(stored) + layers[0].x.shape[2] ** 0.5 * summed)


def _product_eps(device: str, dtype: torch.dtype) -> float:
    """Return the rounding of a product of matrices.

    It is that of the dtype, or of TF32 and bfloat16 products of float32 that the user allowed.
    """
    backends = torch.backends.cuda.matmul if device == "cuda" else torch.backends.mkldnn.matmul
    coarse = {"tf32": 2.0**-10, "bf16": 2.0**-7} if dtype == torch.float32 else {}
    return max(torch.finfo(dtype).eps, coarse.get(backends.fp32_precision, 0.0))


def attended_weight(m: LayerModules) -> Tensor | None:
    """Return the factor of the attention block's output before the residual sum.

    The statistics of an added norm are a second factor, which is not included.

    Returns:
        (d,) in the parameter's dtype; or None if the architecture has no such factor. W_O's output (B, n, d)
        is multiplied by it.
    """
    if m.added_norm is not None:
        return parameter(m.added_norm, "weight") + m.unit_offset
    return None if m.scale is None else parameter(*m.scale)


def _attended(called: nn.Module, layer: LayerTrace) -> Tensor:
    """Return (o W_O + b) . u as the layer adds it to the residual, (B, n)."""
    kept = layer.projections.get("output")
    out = _applied(called, layer) if kept is None else kept.product
    return out if layer.modules.added_norm is None else out * layer.norms["added_norm"].rstd.to(out.dtype)


def _applied(called: nn.Module, layer: LayerTrace) -> Tensor:
    """Return (o W_O + b) . u, (B, n), computed with the matrix that the decomposition uses for W_O."""
    m, o = layer.modules, wide(layer.o).transpose(1, 2).flatten(2)
    try:
        weight, bias = dense_weight(m.output, o.shape[2]).to(o.dtype), dense_bias(m.output, o.shape[2])
    except ValueError as error:
        raise ValueError(f"{error}: {describe(called, m.output)}") from None
    u, factor = layer.directions.of(weight), attended_weight(m)
    u = u if factor is None else u * factor.to(u.dtype)
    out = o @ (weight @ u).to(o.device)
    return out if bias is None else out + (bias.to(o.dtype) @ u).to(o.device)


def _written_to(layer: LayerTrace) -> bool:
    """Return whether someone wrote to the attention's tensors after the call: W_O may share their memory."""
    return any(getattr(layer, name)._version != count for name, count in layer.writes.items())


def _given_difference(layer: LayerTrace, once: _Once) -> tuple[Tensor, Tensor]:
    """Return the difference between W_O's input and the attention output along u, and the input's length.

    Both are zeros, (B, n), where they are one tensor, and where `_applied` computed the product.
    """
    given = layer.projections.get("output given")
    zeros = layer.x.new_zeros(layer.x.shape[:2], dtype=torch.float32)
    if _written_to(layer):
        return zeros + float("inf"), zeros
    if given is None:
        return zeros, zeros
    return _distance(given, once(layer.o))


def _norm_difference(layer: LayerTrace, part: str) -> tuple[Tensor, Tensor]:
    """Return the difference between a norm's output and a layer norm of its parts, and the terms' length.

    Both are (B, n), along u. The difference is zero for torch's own norms.
    """
    returned = layer.projections[f"{part} returned"].product
    if part not in layer.parts:
        return torch.zeros_like(returned), torch.ones_like(returned)
    expected, size = _layer_norm(layer, part, layer.projections[f"{part} weighted"].product)
    return returned - expected, size


def _layer_norm(layer: LayerTrace, part: str, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return a layer norm's output along u, and the length of its terms, (B, n) each.

    z is the norm's input along weight * u, (B, n).
    """
    parts, stats = layer.norm_parts(part), layer.norms[part]
    u = layer.directions[layer.x.shape[2], z.dtype, z.device]
    weight = torch.ones_like(u) if parts.weight is None else parts.weight.to(u.dtype)
    bias = torch.zeros_like(u) if parts.bias is None else parts.bias.to(u.dtype)
    expected = stats.rstd * (z - stats.mean * (weight @ u)) + bias @ u
    # The norm subtracts the mean, so a mean that is large beside the deviation adds its own rounding.
    size = (1 + (stats.mean * stats.rstd).abs()) * torch.linalg.vector_norm(
        weight
    ) + torch.linalg.vector_norm(bias)
    return expected, size


def _not_the_sum(called: nn.Module, layer: LayerTrace) -> str:
    m = layer.modules
    norm = describe(called, m.output_norm if m.pre_norm else m.attention_norm)
    return (
        f"the input of {norm} is not the residual sum that is decomposed, x + o W_O + b with W_O of "
        f"{describe(called, m.output)}: {_changed(called, m.block)}"
    )


def _not_the_sum_after_the_mlp(called: nn.Module, layer: LayerTrace) -> str:
    m = layer.modules
    return (
        f"the input of {describe(called, m.output_norm)} is not the sum of the outputs of "
        f"{describe(called, m.attention_norm)} and {describe(called, m.mlp_output)}: "
        f"{_changed(called, m.block)}"
    )


def _not_the_output(called: nn.Module, layer: LayerTrace) -> str:
    m = layer.modules
    return (
        f"the output of {describe(called, m.block)} is not the output of its "
        f"{describe(called, m.output_norm)}: {_changed(called, m.block)}"
    )


def _not_a_layer_norm(called: nn.Module, layer: LayerTrace, part: str) -> str:
    return (
        f"{describe(called, getattr(layer.modules, part))} doesn't compute a layer norm, which the "
        f"decomposition assumes"
    )


def _not_the_module(called: nn.Module, layer: LayerTrace, part: str, text: str) -> str:
    return (
        f"{describe(called, getattr(layer.modules, part))} doesn't {text}: "
        f"{_changed(called, layer.modules.block)}"
    )


def _changed(called: nn.Module, block: nn.Module) -> str:
    """Return the likely cause of a difference, for errors.

    It names the modules of the block that have hooks, a replaced forward pass, or a class that is not stock.
    """
    suspects = [
        describe(called, module)
        for module in block.modules()
        if module._forward_hooks
        or module._forward_pre_hooks
        or "forward" in vars(module)
        or not type(module).__module__.startswith(("torch.", "transformers."))
    ]
    reason = "an adapter, a hook or a replaced forward pass changes it"
    return f"{reason}; look at {', '.join(suspects[:5])}" if suspects else reason
