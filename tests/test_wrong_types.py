"""Values of wrong types in the arguments of every public call: each is refused by a TypeError or a ValueError
that names the call, or is a legitimate value.
"""

import inspect
import re

import numpy as np
import pytest
import torch
from models import build, random_batch
from tiny import classifier, tokenizer

import pyglobenc
from pyglobenc import DecompX, GlobEnc, GradientAttribution, GradientRollout, Rollout, TransformerAttribution
from pyglobenc.common.arguments import known_arguments
from pyglobenc.compat import chefer

ODD = [
    *("yes", "", b"x", 1, -1, 0.5, float("nan"), 10**30, True, [], [[]], [None], ["yes"], (), {}, {"a": 1}),
    *(set(), range(0), slice(1), object(), len, int, np.int64(1), np.array(["a"]), torch.float16),
    *(torch.tensor(1), torch.tensor([1.5]), torch.tensor([[0]])),
]
CLASSES = {GlobEnc: {}, Rollout: {}, TransformerAttribution: {}, GradientRollout: {}, DecompX: {}}
CLASSES[GradientAttribution] = {"method": "integrated-gradients"}


def names(function):
    """The arguments of a function that a user can give by name."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind in kinds and p.name not in ("self", "progress", "path")]


def public_calls():
    """Each public call: what it is called, its arguments, and a function that calls it with some of them."""
    model, vit, tok = classifier(), build("vit"), tokenizer()
    batch, packed = random_batch(model, batch=2, n=7, pads=[0, 2]), {"input_ids": [[2, 5, 6, 3], [2, 7, 3]]}
    inputs = ["input_ids", "attention_mask", "token_type_ids"]
    for kind, options in CLASSES.items():
        yield kind.__name__, names(kind.__init__), lambda kind=kind, **k: kind(**{"model": model} | k)
        method = kind(model, **options)
        yield kind.__name__, [*names(kind.__call__), *inputs], lambda m=method, **k: m(**batch | k)
        if hasattr(method, "packed"):
            yield kind.__name__, [*names(kind.packed), *inputs], lambda m=method, **k: m.packed(**packed | k)
    own = dict(model=model, tokenizer=tok, text="a film", progress=False)
    yield "explain", names(pyglobenc.explain), lambda **k: pyglobenc.explain(**own | k)
    image = dict(model=vit, processor=None, image=torch.randn(3, 12, 12).double())
    yield "explain_image", names(pyglobenc.explain_image), lambda **k: pyglobenc.explain_image(**image | k)
    table = dict(model=model, tokenizer=tok, texts=["a film"], methods="globenc", bootstrap=2, progress=False)
    yield "evaluate", names(pyglobenc.evaluate), lambda **k: pyglobenc.evaluate(**table | k)

    def captured(**options):
        with pyglobenc.capture(**{"model": model} | options) as trace:
            model(**batch)
        return trace.layers

    yield "capture", names(pyglobenc.capture), captured
    generator = chefer.Generator(model)
    one = {name: t[:1] for name, t in batch.items()}
    yield "compat", ["index", "start_layer"], lambda **k: generator.generate_LRP(**one | k)
    found = pyglobenc.explain(**own)
    for name in ("to_html", "to_png", "units", "show", "save"):
        yield "Attribution", ["path", "merge_words"], lambda name=name, **k: getattr(found, name)(**k)
    yield "load", ["path"], pyglobenc.load


@pytest.mark.filterwarnings("ignore")
def test_values_of_wrong_types_are_refused_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    others, done = [], 0
    for who, arguments, call in public_calls():
        for name in arguments:
            for value in ODD:
                if name == "processor" and callable(value):
                    continue
                done += 1
                try:
                    call(**{name: value})
                except (TypeError, ValueError) as error:
                    # the method inside may be the one that checks
                    if not re.match(r"[A-Za-z_]+: .", str(error)):
                        others.append((who, name, repr(value), repr(error)))
                except OSError:
                    assert name == "path"
                except Exception as error:
                    others.append((who, name, repr(value), repr(error)))
    assert done > 3000 and not others, "\n".join(map(str, others[:20]))


@pytest.mark.parametrize("flag", ["yes", 1, None, [], "False"])
def test_flags_are_true_or_false(flag):
    model, batch = classifier(), {"input_ids": torch.tensor([[5, 6]])}
    for method in (GlobEnc(model), Rollout(model), TransformerAttribution(model)):
        with pytest.raises(TypeError, match=f"{type(method).__name__}: layers must be True or False, got "):
            method(**batch, layers=flag)
        with pytest.raises(TypeError, match=f"{type(method).__name__}: layers must be True or False, got "):
            method.packed(input_ids=[[5, 6]], layers=flag)


def test_types_are_those_of_the_annotations():
    @known_arguments
    def call(a: bool, b: "int | None" = None, *, c: float = 0.0, d: "int | str" = "", **others: int):
        return a, b, c, d, others

    assert call(True, np.int64(2), c=3, d=[], e="x") == (True, 2, 3, [], {"e": "x"})  # left to the function
    assert call(np.bool_(True), None, c=np.float32(1), d=7)
    for wrong in (
        {"a": 1},
        {"a": True, "b": True},
        {"a": True, "b": 1.0},
        {"a": True, "c": "1"},
        {"a": None},
    ):
        with pytest.raises(
            TypeError, match=r"test_types.*: [abc] must be (True or False|an integer|a number)"
        ):
            call(**wrong)
    with pytest.raises(TypeError, match="a must be True or False, got 1"):
        call(1)
