"""How pip, Python's import system and transformers see the repository."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from pyglobenc import __version__

ROOT = Path(__file__).parents[1]
IMPORT_BERT = """
import sys
sys.path.insert(0, "")
from transformers import BertConfig, BertModel
BertModel(BertConfig(num_hidden_layers=1, vocab_size=9))
"""


def python(code, cwd, **env):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=os.environ | env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kernels_folder_never_is_a_package():
    """transformers imports any package called kernels that it finds, so our folder must not be one."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    for path in (ROOT / "kernels").rglob("*"):
        assert path.stem not in ("triton", "torch")


# The real model of cli/test_cli.py starts there too.
@pytest.mark.slow
def test_transformers_imports_from_the_repository_root():
    python(IMPORT_BERT, ROOT)


@pytest.mark.slow
def test_transformers_imports_beside_the_other_kernels_package(tmp_path):
    """Models import whether a stand-in for the package "kernels" is found before or after our folder."""
    other = tmp_path / "kernels"
    other.mkdir()
    (other / "__init__.py").write_text(
        "__version__ = '0.1.0'\nraise ImportError('the other package, broken')\n"
    )
    found = python(
        "import sys; sys.path.insert(0, ''); import importlib.util; "
        "print(importlib.util.find_spec('kernels').origin)",
        ROOT,
    )
    assert "None" in found, "without the other package, our folder is no more than a namespace"
    python("import pyglobenc; print(pyglobenc.GlobEnc)", ROOT)
    python("import pyglobenc.kernels; print(pyglobenc.kernels.__file__)", tmp_path)


def test_setup_does_not_import_torch():
    names = set()
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    assert not names & {"torch", "triton", "transformers", "numpy"}
    assert "torch" not in (ROOT / "pyproject.toml").read_text().split("[project]")[0]


def test_import_loads_no_backend():
    loaded = python("import sys, pyglobenc; print(*sys.modules, sep='\\n')", ROOT).split()
    assert not [name for name in loaded if name.startswith(("pyglobenc.backends.cpu.", "pyglobenc.kernels."))]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Return the wheel built from the sdist, without compiled extensions, so that it takes seconds."""
    out = tmp_path_factory.mktemp("dist")
    env = os.environ | {"PYGLOBENC_NO_EXTENSIONS": "1"}
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(build, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


def test_sdist_and_wheel_hold_the_sources(wheel):
    import tarfile
    import zipfile

    names = zipfile.ZipFile(wheel[0]).namelist()
    tracked = subprocess.run(
        ["git", "ls-files", "pyglobenc", "kernels/fused"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    for path in tracked:
        assert path.replace("kernels/fused", "pyglobenc/kernels") in names, path
    assert "pyglobenc/measured/backends.json" in names
    with tarfile.open(wheel[1]) as archive:
        sources = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    tracked = subprocess.run(
        ["git", "ls-files", "csrc"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    assert set(tracked) <= sources


def test_wheel_runs(wheel, tmp_path):
    import zipfile

    zipfile.ZipFile(wheel[0]).extractall(tmp_path)
    code = "import pyglobenc, pyglobenc.kernels; print(pyglobenc.__file__, pyglobenc.kernels.__file__)"
    printed = python(code, tmp_path, PYTHONPATH=str(tmp_path))
    assert printed.count(str(tmp_path)) == 2


# This compiler creates every output file empty.
COMPILER = """#!/bin/sh
while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done
"""


@pytest.fixture
def checkout(tmp_path):
    """Return a copy of what setup.py needs, in a folder whose name the shell and ninja would both misread."""
    folder = tmp_path / "it's a: $checkout"
    for name in ("csrc", "pyglobenc", "kernels", "benchmarks/results"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "*.png"))
    for name in ("setup.py", "pyproject.toml", "bootstrap.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    (folder / "c++").write_text(COMPILER)
    (folder / "c++").chmod(0o755)
    return folder


def build_in(folder, compiler):
    env = os.environ | {
        "CXX": shlex.quote(str(compiler)),
        "PYGLOBENC_SETS": "portable",
        "PYGLOBENC_NO_CUDA": "1",
    }
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = "import bootstrap; bootstrap.tell_what_is_missing()"
    return subprocess.run(
        [sys.executable, "-c", told], cwd=folder, capture_output=True, text=True
    ).stderr.splitlines()


def test_modules_are_built_whatever_the_folder_is_called(checkout):
    left_out = (
        "pyglobenc._cuda is not built, so other backends run in its place: left out, PYGLOBENC_NO_CUDA is set"
    )
    assert build_in(checkout, checkout / "c++") == [f"{left_out} (build/pyglobenc._cuda.failed)"]
    assert list((checkout / "pyglobenc").glob("_cpu*.so"))


def test_bootstrap_says_why_a_module_is_not_built(checkout):
    lines = build_in(checkout, checkout / "no compiler")
    assert (
        len(lines) == 2
        and lines[0].startswith("pyglobenc._cpu is not built")
        and "no C++ compiler found" in lines[0]
    )
    (checkout / "csrc" / "cpu" / "table.cpp").unlink()
    lines = build_in(checkout, checkout / "c++")
    assert "ninja: error" in lines[0] and "table.cpp" in lines[0]
    shutil.copy(ROOT / "csrc" / "cpu" / "table.cpp", checkout / "csrc" / "cpu")
    assert len(build_in(checkout, checkout / "c++")) == 1


def test_the_lock_names_every_requirement_for_every_python():
    tomllib = pytest.importorskip("tomllib", reason="of Python 3.11 and later")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    extras = project["project"]["optional-dependencies"]
    wanted = [*project["project"]["dependencies"], *extras["test"], *extras["demo"], *extras["browser"]]
    wanted += project["build-system"]["requires"]
    lines = [
        line
        for line in (ROOT / "requirements" / "ci.txt").read_text("utf-8").splitlines()
        if not line.startswith("#")
    ]
    locked = [Requirement(line) for line in lines]
    assert all(str(one.specifier).startswith("==") and one.url is None for one in locked)
    for version in ("3.10", "3.11", "3.12", "3.13"):
        machine = dict(
            python_version=version,
            python_full_version=f"{version}.5",
            sys_platform="linux",
            platform_machine="x86_64",
        )
        chosen = {
            one.name: one.specifier for one in locked if one.marker is None or one.marker.evaluate(machine)
        }
        for one in map(Requirement, wanted):
            # bootstrap.py names torch itself.
            if one.name != "torch":
                exact = str(chosen[one.name]).removeprefix("==")
                assert one.specifier.contains(exact), (version, one.name, exact)


def test_the_citation_has_the_version_of_the_package():
    version = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE).group(1)
    assert version == __version__
