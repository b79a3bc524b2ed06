"""Builds csrc/ into pyglobenc._cpu and pyglobenc._cuda with ninja. Static metadata is in pyproject.toml.

This file never imports torch. pyglobenc._cpu has one object for each source and instruction set, and chooses
the set when it is imported. pyglobenc._cuda has one object for each source, with code for the chosen
architectures and PTX for later ones. If there is no compiler, or compiling fails, the package is installed
without the module, and another backend runs instead. These environment variables are read:

PYGLOBENC_NO_EXTENSIONS=1   leave both modules out
PYGLOBENC_NO_CUDA=1         leave _cuda out
PYGLOBENC_CXX_FLAGS         more flags for compiling and linking _cpu, such as -fsanitize=address,undefined
PYGLOBENC_SETS              instruction sets to build, such as portable,avx2
PYGLOBENC_CUDA_ARCHS        compute capabilities to build, such as 90 (default 80,90)
CXX                         the compiler
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CPU, CUDA = Path("csrc/cpu"), Path("csrc/cuda")
OPS = (
    "pair_norms",
    "rollout_step",
    "head_gram",
    "norm_terms",
    "clone_relevance",
    "add_relevance",
    "linear_relevance",
    "matmul",
    "relevance_attention",
    "relevance_maps",
    "proximity",
    "projection",
    "exp",
    "table",
)
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"]
SETS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": AVX512,
    "avx512bf16": [*AVX512, "-mavx512bf16"],
    "amx": [*AVX512, "-mamx-tile", "-mamx-bf16"],
}
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden"]
CPU_FLAGS = ["-ffp-contract=fast", "-fno-math-errno", "-Wall", "-Wextra"]
# gcc 12 warns about its own intrinsics, and about the ABI of vectors passed by value, which doesn't matter
# inside one module.
QUIET = ["-Wno-maybe-uninitialized", "-Wno-psabi"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]


def switched_on(name: str) -> bool:
    """Return whether an environment variable is set to something other than 0."""
    return os.environ.get(name, "0") not in ("", "0")


def find_compiler() -> list[str]:
    """Return the C++ compiler's command: $CXX, or the first one on PATH; raise CompileError without one."""
    for command in [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]:
        if shutil.which(shlex.split(command)[0]):
            return shlex.split(command)
    raise CompileError("no C++ compiler found")


def find_ninja() -> str:
    """Return the path of ninja, from PATH or from the Python package; raise CompileError without one."""
    found = shutil.which("ninja")
    if found:
        return found
    try:
        import ninja
    except ImportError:
        raise CompileError("ninja is missing") from None
    return str(Path(ninja.BIN_DIR) / "ninja")


def accepts(compiler: list[str], flag: str, folder: Path) -> bool:
    """Return whether a small program compiles and links with a flag; it is written into the folder."""
    source = folder / "try.cpp"
    source.write_text("int main() { return 0; }\n")
    return (
        subprocess.run(
            [*compiler, flag, str(source), "-o", str(folder / "try")], capture_output=True
        ).returncode
        == 0
    )


def instruction_sets() -> list[str]:
    """Return the names in SETS to build: those that the user chose, else all for this processor's family."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    wanted = os.environ.get("PYGLOBENC_SETS")
    if wanted:
        return [name for name in SETS if name in wanted.split(",")]
    return list(SETS) if x86 else ["portable"]


def architectures() -> str:
    """Return nvcc's flag for the compute capabilities to build, with PTX of the lowest one for newer GPUs."""
    archs = sorted(os.environ.get("PYGLOBENC_CUDA_ARCHS", "80,90").split(","), key=int)
    code = ",".join(f"sm_{arch}" for arch in archs)
    return f"-gencode=arch=compute_{archs[0]},code=[{code},compute_{archs[0]}]"


def shell(*words: str | Path) -> str:
    """Return a command as a build file holds it: quoted for the shell, with $ escaped for ninja."""
    return shlex.join(map(str, words)).replace("$", "$$")


def ninja_path(name: str | Path) -> str:
    """Return a path as a build file holds it, since a space or a colon would end the name."""
    return re.sub(r"([$ :])", r"$\1", str(name))


class BuildFile:
    """The build.ninja of one module: how to compile each source, and which objects to link."""

    def __init__(self) -> None:
        self.lines, self.objects = [], []

    def rule(self, name: str, *command: str) -> None:
        # ninja itself quotes $in and $out for the shell.
        steps = f"{shell(*command)} $extra -MMD -MF $out.d -c $in -o $out"
        self.lines += [f"rule {name}", f"  command = {steps}", "  depfile = $out.d", "  deps = gcc"]

    def compile(self, rule: str, source: Path, name: str, *extra: str) -> None:
        self.objects.append(name)
        self.lines += [f"build {name}: {rule} {ninja_path(source.resolve())}", f"  extra = {shell(*extra)}"]

    def link(self, output: Path, *command: str) -> str:
        """Return the text of the file, with the link step at its end."""
        undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        step = f"{shell(*command, '-shared', *undefined)} $in -o $out"
        self.lines += [
            "rule link",
            f"  command = {step}",
            f"build {ninja_path(output)}: link {' '.join(self.objects)}",
        ]
        return "\n".join(self.lines) + "\n"


def python_includes() -> list[str]:
    """Return the flags that find the headers of Python and pybind11."""
    import pybind11

    return ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]


def cpu_build(output: Path, folder: Path) -> str:
    """Return the text of build.ninja for pyglobenc._cpu."""
    compiler = find_compiler()
    sets = [
        name for name in instruction_sets() if all(accepts(compiler, flag, folder) for flag in SETS[name])
    ]
    flags = [*FLAGS, *CPU_FLAGS, *QUIET, *shlex.split(os.environ.get("PYGLOBENC_CXX_FLAGS", ""))]
    flags += [f"-DPYGLOBENC_HAS_{name.upper()}" for name in sets]
    if accepts(compiler, "-fopenmp", folder):
        flags.append("-fopenmp")
    file = BuildFile()
    file.rule("compile", *compiler, *flags)
    # The portable objects come first: if several objects define a function, the linker takes the first one.
    for isa in sets:
        for op in OPS:
            file.compile("compile", CPU / f"{op}.cpp", f"{op}.{isa}.o", *SETS[isa], f"-DPYGLOBENC_ISA={isa}")
    file.compile("compile", CPU / "bindings.cpp", "bindings.o", *python_includes())
    return file.link(output, *compiler, *flags)


def cuda_build(output: Path, folder: Path) -> str:
    """Return the text of build.ninja for pyglobenc._cuda."""
    if switched_on("PYGLOBENC_NO_CUDA"):
        raise CompileError("left out, PYGLOBENC_NO_CUDA is set")
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise CompileError("no nvcc found")
    file = BuildFile()
    file.rule("compile", *find_compiler(), *FLAGS)
    file.rule("nvcc", nvcc, *NVCC_FLAGS, architectures())
    for source in sorted(CUDA.glob("*.cu")):
        file.compile("nvcc", source, f"{source.stem}.o")
    file.compile("compile", CUDA / "bindings.cpp", "bindings.o", *python_includes())
    # nvcc links the CUDA runtime statically.
    return file.link(output, nvcc)


class BuildWithNinja(build_ext):
    """Compiles the extensions with ninja; a failure is only a warning, since the extensions are optional."""

    def run(self) -> None:
        # A module left from an earlier build must not be taken for this one.
        for ext in self.extensions:
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        failed = Path("build", f"{ext.name}.failed")
        failed.unlink(missing_ok=True)
        try:
            self._build(ext)
        except CompileError as error:
            # pip hides warnings, so bootstrap.py reads the reason from this file.
            failed.parent.mkdir(exist_ok=True)
            failed.write_text(str(error), encoding="utf-8")
            raise

    def _build(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.unlink(missing_ok=True)
        if switched_on("PYGLOBENC_NO_EXTENSIONS"):
            raise CompileError("left out, PYGLOBENC_NO_EXTENSIONS is set")
        name = ext.name.rpartition("_")[2]
        folder = Path(self.build_temp).resolve() / name
        folder.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        text = {"cpu": cpu_build, "cuda": cuda_build}[name](output, folder)
        (folder / "build.ninja").write_text(text)
        done = subprocess.run(
            [find_ninja(), "-C", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if done.returncode:
            raise CompileError(f"ninja failed:\n{done.stdout[-4000:]}")


setup(
    ext_modules=[
        Extension(f"pyglobenc._{folder.name}", [str(folder / "bindings.cpp")], optional=True)
        for folder in (CPU, CUDA)
    ],
    cmdclass={"build_ext": BuildWithNinja},
)
