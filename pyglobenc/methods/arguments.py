"""The inputs of a model that a method honours. Every other keyword argument is refused by name."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from functools import lru_cache, wraps
from inspect import Parameter, signature
from threading import get_ident
from typing import Any

from torch import Tensor, nn

from pyglobenc.common.arguments import argument_names, refuse_unknown
from pyglobenc.common.deferred import require
from pyglobenc.hf.unwrap import is_stock_model, stock_model

# Inputs that a stock model may be given, if its forward pass names them.
TENSORS = frozenset({"input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"})
HONOURED = TENSORS | {"logits_to_keep"}
IMAGES = frozenset({"pixel_values", "interpolate_pos_encoding"})
PACKED = frozenset({"input_ids", "attention_mask", "token_type_ids"})
NO_CACHE = "keys and values of earlier calls have no tokens to attribute to"
# Other arguments of transformers' models. Each has one value that changes nothing, and a reason why other
# values are refused.
REFUSED = {
    "return_dict": (True, "the output is always a ModelOutput"),
    "output_attentions": (False, "attention probabilities are never stored; ask the model itself for them"),
    "use_cache": (False, "no later call would read the cache"),
    "cache": (None, NO_CACHE),
    "past_key_values": (None, NO_CACHE),
    "cache_position": (None, NO_CACHE),
    "labels": (None, "an attribution has no loss; ask the model itself for it"),
    "bool_masked_pos": (None, "patches that are masked would count as if they were seen"),
}
PACKED_REFUSED = REFUSED | {
    "position_ids": (None, "packed sequences get the positions that the model gives each one alone"),
    "inputs_embeds": (None, "packed sequences are token ids"),
    "output_hidden_states": (
        False,
        "packed sequences return only what the head reads",
    ),
}


def model_inputs(
    who: str, model: nn.Module, batch: Mapping[str, Any], method: Callable[..., Any]
) -> dict[str, Any]:
    """Return the inputs of a call that are passed on to the model.

    Arguments that the model can't honour are refused. Those with a value that changes nothing are left out.

    Args:
        who: name of the method for errors.
        model: the module that is called: a stock model, or the user's module around one. Its forward pass
            tells which inputs it takes.
        batch: the keyword arguments of the call, without the method's own: tensors such as input_ids (B, n),
            and options.
        method: the function that was called. Its own options are suggested where a name is misspelt.

    Returns:
        The entries of batch that the model gets, unchanged.

    Raises:
        TypeError: neither the method nor the model takes an argument of this name.
        ValueError: an argument of transformers' models can't be honoured.
    """
    named, others = _forward_names(model)
    if not is_stock_model(model):
        images = stock_model(model).main_input_name == "pixel_values"
        return _checked(
            who, batch, named | ((IMAGES if images else TENSORS) if others else set()), REFUSED, method
        )
    if others:
        # A head passes the arguments that it doesn't name on to the model inside.
        named = named | _forward_names(model.base_model)[0]
    batch = {name: value for name, value in batch.items() if value is not None or name not in named}
    types = batch.get("token_type_ids")
    if "token_type_ids" not in named and isinstance(types, Tensor):
        # Some tokenizers return token types of 0 for models without token types. Zeros change nothing.
        require(
            ~types.any(),
            lambda: TypeError(f"{who}: takes no token_type_ids: {type(model).__name__} has no token types"),
        )
        del batch["token_type_ids"]
    honoured = (IMAGES if model.main_input_name == "pixel_values" else HONOURED) & named
    return _checked(who, batch, honoured | {"output_hidden_states"}, REFUSED, method)


def packed_inputs(who: str, batch: Mapping[str, Any], method: Callable[..., Any]) -> dict[str, Any]:
    """Return the inputs of packed sequences that are passed on to the model.

    Args:
        who, method: as for `model_inputs`.
        batch: the keyword arguments of the call. Each input is a list of S sequences (n_s,), one for each
            text.

    Returns:
        The entries of batch that the model gets, unchanged.

    Raises:
        TypeError, ValueError: as `model_inputs`.
    """
    return _checked(who, batch, PACKED, PACKED_REFUSED, method)


def check_maps(who: str, maps: Any, known: Collection[str]) -> None:
    """Check the names of maps that a call asks for; no tensors.

    Raises:
        ValueError: they aren't a collection of known names. The message begins with `who`.
    """
    names = list(maps) if isinstance(maps, Sequence | Set) and not isinstance(maps, str) else [None]
    if any(name not in tuple(known) for name in names):
        raise ValueError(f"{who}: maps must be a sequence of names among {', '.join(known)}, got {maps!r}")


def check_start_layer(who: str, start_layer: Any, depth: int) -> None:
    """Check that start_layer is a layer of a model of `depth` layers; it takes no tensors.

    Raises:
        TypeError, ValueError: it isn't an integer in [0, depth). The message begins with `who`.
    """
    if isinstance(start_layer, bool) or not isinstance(start_layer, int):
        raise TypeError(f"{who}: start_layer must be an integer, got {start_layer!r}")
    if not 0 <= start_layer < depth:
        raise ValueError(
            f"{who}: start_layer must lie in [0, {depth}), the model's layers, got {start_layer}"
        )


def takes(model: nn.Module, name: str) -> bool:
    """Tell whether a module's forward pass names an argument.

    For a stock head the forward pass of the model inside counts too. Only signatures are read, no tensors.
    """
    named, others = _forward_names(model)
    return name in named or (others and is_stock_model(model) and name in _forward_names(model.base_model)[0])


def accepts(model: nn.Module, name: str) -> bool:
    """Tell whether a model can be given one of its tokenizer's outputs, for example "token_type_ids".

    The model is a stock model, or the user's module around one. The function reads signatures, no tensors.
    """
    named, others = _forward_names(model)
    if is_stock_model(model):
        return takes(model, name)
    return name in named or (others and takes(stock_model(model), name))


def output_settings(model: nn.Module) -> dict[str, Any]:
    """Return the keyword arguments that choose the form of a model's output, whatever its config says.

    A stock model gets all that it takes, a user's module those that it names. The values are booleans.
    """
    # A cache would store every key and value a second time.
    settings = {"return_dict": True, "output_attentions": False, "use_cache": False}
    # The models of transformers take these two, whether their signatures name them or not.
    takes_all = type(model).__module__.startswith("transformers.") or _forward_names(model)[1]
    always = ("return_dict", "output_attentions") if takes_all and is_stock_model(model) else ()
    return {name: value for name, value in settings.items() if name in always or takes(model, name)}


def run_model(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    """Call a model on a batch, with `output_settings`, and return its output.

    Args:
        model: a stock model, or the user's module around one.
        batch: its inputs, such as input_ids (B, n).

    Raises:
        ValueError: the model takes several choices an example, and the batch has one text each.
    """
    _check_choices(model, batch)
    with ExitStack() as stack:
        if (
            is_stock_model(model)
            and model.base_model is not model
            and not getattr(model.config, "return_dict", True)
        ):
            stack.enter_context(_named_outputs(model.base_model))
        return model(**{**batch, **output_settings(model)})


def _check_choices(model: nn.Module, batch: Mapping[str, Any]) -> None:
    ids = batch.get("input_ids")
    if any(kind.__name__.endswith("ForMultipleChoice") for kind in type(model).__mro__) and (
        isinstance(ids, Tensor) and ids.dim() != 3
    ):
        raise ValueError(
            f"capture: {type(model).__name__} takes input_ids (B, choices, n), got {tuple(ids.shape)}; "
            "TransformerAttribution explains a choice, and other methods explain its base_model"
        )


@contextmanager
def _named_outputs(base: nn.Module) -> Iterator[None]:
    """Context in which a base model returns a ModelOutput in this thread.

    Some heads read the output of their base model by name, but leave its type to the config.
    """
    forward, thread = base.forward, get_ident()

    def run(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **(kwargs | {"return_dict": True} if get_ident() == thread else kwargs))

    with forward_replaced(base, run):
        yield


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Context in which a function stands in the place of a module's forward method.

    The function gets the method's signature, because other threads may read it meanwhile.
    """
    own = vars(module).get("forward")
    vars(module)["forward"] = wraps(module.forward)(forward)
    try:
        yield
    finally:
        if own is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = own


def _checked(
    who: str,
    batch: Mapping[str, Any],
    honoured: frozenset[str],
    refused: Mapping[str, Any],
    method: Callable[..., Any],
) -> dict[str, Any]:
    unknown = batch.keys() - honoured - refused.keys()
    if unknown:
        refuse_unknown(who, unknown, honoured | argument_names(method))
    for name in batch.keys() - honoured:
        neutral, reason = refused[name]
        if batch[name] is not None and batch[name] is not neutral:
            raise ValueError(f"{who}: {name} can't be honoured: {reason}")
    hidden = batch.get("output_hidden_states")
    if not isinstance(hidden, bool | None):
        raise TypeError(f"{who}: output_hidden_states must be True or False, got {hidden!r:.80}")
    return {name: batch[name] for name in batch if name in honoured}


def _forward_names(module: nn.Module) -> tuple[frozenset[str], bool]:
    """Return the names of a forward pass's arguments, and whether it takes others too."""
    # Reading a signature takes as long as a small kernel, so classes are cached. A replaced forward pass
    # may hold a reference to the model, so it isn't cached.
    return _names(module.forward) if "forward" in vars(module) else _class_names(type(module))


@lru_cache(maxsize=64)
def _class_names(kind: type[nn.Module]) -> tuple[frozenset[str], bool]:
    named, others = _names(kind.forward)
    return named - {next(iter(signature(kind.forward).parameters), None)}, others


def _names(forward: Callable[..., Any]) -> tuple[frozenset[str], bool]:
    return argument_names(forward), any(
        p.kind is Parameter.VAR_KEYWORD for p in signature(forward).parameters.values()
    )
