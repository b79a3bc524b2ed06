"""Imports go one way: a room imports rooms of a lower rank, and no modules import each other in a circle."""

import ast
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import pyglobenc

ROOT = Path(__file__).parents[1]
# A module imports its own room and rooms of a lower rank.
RANKS = {
    "_version": 0,
    "common": 0,
    "backends": 1,
    "kernels": 1,
    "viz": 1,
    "ops": 2,
    "results": 2,
    "bench": 3,
    "hf": 3,
    "models": 4,
    "methods": 4,
    "inputs": 5,
    "explain": 6,
    "compat": 7,
    "evaluate": 8,
    "scale": 7,
    "demo": 9,
    "integrations": 9,
    "cli": 10,
    "memory": 8,
    "windows": 8,
    "distributed": 8,
    "__init__": 11,
    "__main__": 11,
}
# The Triton kernels are installed as pyglobenc.kernels, and both sides need what the other defines for
# launches.
TOGETHER = {frozenset({"backends", "kernels"})}


def modules() -> dict[str, Path]:
    """Every module of the package, by its dotted name."""
    found = {}
    for folder, prefix in (
        (ROOT / "pyglobenc", "pyglobenc"),
        (ROOT / "kernels" / "fused", "pyglobenc.kernels"),
    ):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            if prefix == "pyglobenc" and parts[0] == "kernels":
                continue
            found[".".join((prefix, *parts)).removesuffix(".__init__") or prefix] = path
    return found


def imported(path: Path, known: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """Modules of the package that a file imports, anywhere in it, and the line."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "pyglobenc":
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield (name if name in known else node.module), node.lineno


def room(module: str) -> str:
    """The room of a module: the second part of its name."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def test_imports_go_one_way():
    known, against = modules(), []
    for module, path in known.items():
        for target, line in imported(path, known):
            here, there = room(module), room(target)
            # The compiled modules and the package's own name are leaves.
            if there == "__init__" or here == there or frozenset({here, there}) in TOGETHER:
                continue
            if RANKS[there] >= RANKS[here]:
                against.append(f"{path.relative_to(ROOT)}:{line}: {here} imports {there}")
    assert not against, "\n".join(against)


def test_no_modules_import_each_other_in_a_circle():
    known = modules()
    targets = {
        module: {target for target, _ in imported(path, known)} - {module, "pyglobenc"}
        for module, path in known.items()
    }
    done, waiting = set(), []

    def visit(module: str) -> None:
        if module in waiting:
            raise AssertionError(" -> ".join([*waiting[waiting.index(module) :], module]))
        if module in done:
            return
        waiting.append(module)
        for target in sorted(targets.get(module, ())):
            visit(target)
        waiting.pop()
        done.add(module)

    for module in sorted(known):
        visit(module)


def test_no_module_has_the_name_of_a_public_function():
    """Importing such a module would replace the function by the module."""
    for name in pyglobenc.__all__:
        module = ROOT / "pyglobenc" / name
        # `explain` is imported with the package, after its room.
        assert name in ("explain", "evaluate") or not (module.exists() or module.with_suffix(".py").exists())
    import_module("pyglobenc.explain.layers")
    assert callable(pyglobenc.explain) and callable(pyglobenc.evaluate)
    assert callable(pyglobenc.explain_layers)


@pytest.mark.parametrize(
    "path, name",
    [
        ("pyglobenc.memory", "estimate_memory"),
        ("pyglobenc.windows", "join"),
        ("pyglobenc.distributed", "ShardedGlobEnc"),
        ("pyglobenc.hf", "capture"),
        ("pyglobenc.ops", "token_norms"),
    ],
)
def test_former_paths_work(path, name):
    assert callable(getattr(import_module(path), name))
