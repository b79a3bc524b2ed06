"""Saved attributions changed at random: a file that loads can be used, and any other is refused by name."""

import copy
import json
import random

import numpy as np
import pytest
from safetensors.numpy import save as to_safetensors

import pyglobenc
from pyglobenc.results.attribution import FORMAT, Attribution, Attributions

# Each value is wrong for most fields: another type, a number too large for 64 bits or for a float, a control
# character or a lone surrogate.
VALUES = [
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**30, 10**400, -0.0, 0.5, 1e39, 1e308, float("nan"),
    float("inf"),
    "", "0", "float16", "object", "U1000000000", "f8", "class", "\x1b[2J", "\ud800", [], [[]], [None], [0, 1],
    [[0, 1]], {}, {"a": {}},
    {"__class__": "os.system"}, [[1, 2, 3]], [["a", 0.5]], [0.5] * 3, ["a"] * 3, [True] * 3, [[2, 1]] * 3,
]  # fmt: skip


def document(several=True):
    one = Attribution(
        text="a deep film",
        tokens=["[CLS]", "deep", "film"],
        token_ids=[2, 7, 8],
        special=[True, False, False],
        scores=np.array([1, 0.25, -0.5], dtype=np.float32),
        method="globenc",
        model="m",
        target=0,
        target_name="[CLS]",
        word_ids=[None, 0, 1],
        offsets=[(0, 0), (2, 6), (7, 11)],
        windows=[(1, 2), (2, 3)],
        merge_words=True,
        label="GOOD",
        probability=0.75,
        predictions=[("GOOD", 0.75)],
        settings={"stride": None, "batch_size": 8},
    )
    return json.loads(pyglobenc.results.to_json([one, one] if several else one))


def places(value, path=()):
    """Return the path to every entry of a JSON value, as keys from the top."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in inner:
        yield from places(entry, (*path, key))


def changed(value, chance):
    """Return a JSON value with one entry replaced, removed, doubled or added."""
    value = copy.deepcopy(value)
    *path, key = chance.choice([path for path in places(value) if path])
    holder = value
    for step in path:
        holder = holder[step]
    way = chance.randrange(5)
    if way < 3:
        holder[key] = chance.choice(VALUES)
    elif way == 3:
        del holder[key]
    elif isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
    else:
        holder[chance.choice(["extra", "scores", "words", "dtype"])] = chance.choice(VALUES)
    return value


def damaged(data, chance):
    """Return bytes with some of them changed, cut or doubled."""
    data, at = bytearray(data), chance.randrange(len(data))
    way = chance.randrange(3)
    if way == 0:
        data[at] ^= 1 << chance.randrange(8)
    elif way == 1:
        del data[at : at + chance.choice([1, 8, len(data)])]
    else:
        data[at:at] = data[max(0, at - chance.choice([1, 20])) : at]
    return bytes(data)


def as_safetensors(value, chance):
    """Return a file with the scores as tensors; some have another dtype, shape, name or number."""
    entries = value.get("attributions")
    entries = entries if isinstance(entries, list) else []
    tensors = {}
    for index, entry in enumerate(entries):
        scores = entry.pop("scores", None) if isinstance(entry, dict) else None
        try:
            with np.errstate(over="ignore"):
                tensors[str(index)] = np.asarray(scores, dtype=np.float32)
        except (TypeError, ValueError, OverflowError):
            tensors[str(index)] = np.zeros(3, np.float32)
    if chance.random() < 0.3 and tensors:
        name = chance.choice(list(tensors))
        odd = [
            np.zeros((3, 1), np.float32),
            np.zeros(3, np.int64),
            np.full(3, np.nan, np.float32),
            np.zeros(0, np.float32),
        ]
        tensors[chance.choice([name, "x"])] = chance.choice(
            [*odd, np.zeros(3, np.float16), np.zeros(3, np.float64)]
        )
    return to_safetensors(tensors, {FORMAT: json.dumps(value)})


def tampered(seed):
    """Return the suffix and the bytes of a file."""
    chance = random.Random(seed)
    value = document(several=chance.random() < 0.5)
    for _ in range(chance.choice([0, 1, 1, 1, 2])):
        value = changed(value, chance)
    suffix = chance.choice([".json", ".safetensors"])
    data = json.dumps(value).encode() if suffix == ".json" else as_safetensors(value, chance)
    return suffix, damaged(data, chance) if chance.random() < 0.4 else data


def use(found):
    """Do everything that can be done with an attribution, except slow pictures."""
    several = found if isinstance(found, Attributions) else Attributions([found])
    several.to_html()
    several.show()
    for one in several:
        assert one == Attribution.from_dict(json.loads(json.dumps(one.to_dict())))
        assert len(repr(one)) and len(one.units(merge_words=False)) == len(one)


def check(seeds, folder):
    """Return how many of the files were refused."""
    refused = 0
    for seed in seeds:
        suffix, data = tampered(seed)
        path = folder / f"tampered{suffix}"
        path.write_bytes(data)
        try:
            found = pyglobenc.load(path)
        except ValueError as error:
            assert str(path) in str(error), seed
            refused += 1
        else:
            use(found)
    return refused


def test_tampered_files_are_refused_or_usable(tmp_path, capsys):
    refused = check(range(300), tmp_path)
    assert 100 < refused < 300, "both kinds are there"


@pytest.mark.slow
def test_many_tampered_files(tmp_path, capsys):
    check(range(300, 6000), tmp_path)
