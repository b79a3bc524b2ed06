"""Builds csrc/ into pyglobenc._cpu with ninja; everything declarative is in pyproject.toml. Never imports torch.

One object a source and instruction set; the module picks the set when it is imported. Without a compiler, or when compiling fails, the
install goes on without the module and the reference runs instead. Environment:

PYGLOBENC_NO_EXTENSIONS=1   leave the module out
PYGLOBENC_CXX_FLAGS         further flags for compiling and linking, such as -fsanitize=address,undefined
PYGLOBENC_SETS              instruction sets to build, such as portable,avx2
CXX                         the compiler
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CPU = Path("csrc/cpu")
OPS = (
    "token_norms",
    "rollout_step",
    "head_gram",
    "clone_relevance",
    "add_relevance",
    "linear_relevance",
    "relevance_attention",
    "exp",
    "table",
)
SETS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"],
}
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno", "-Wall", "-Wextra"]
# gcc 12 warns about its own intrinsics; passing vectors by value has no ABI to keep here
QUIET = ["-Wno-maybe-uninitialized", "-Wno-psabi"]


def find_compiler() -> list[str]:
    """$CXX, or the first C++ compiler on PATH, as a command; raises CompileError without one."""
    for command in ([os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]):
        if shutil.which(command.split()[0]):
            return command.split()
    raise CompileError("no C++ compiler found")


def find_ninja() -> str:
    """Path of ninja: on PATH, or from the package of that name."""
    found = shutil.which("ninja")
    if found:
        return found
    try:
        import ninja
    except ImportError:
        raise CompileError("ninja is missing") from None
    return str(Path(ninja.BIN_DIR) / "ninja")


def accepts(compiler: list[str], flag: str, folder: Path) -> bool:
    """Whether a program compiles and links with a flag."""
    source = folder / "try.cpp"
    source.write_text("int main() { return 0; }\n")
    return subprocess.run([*compiler, flag, str(source), "-o", str(folder / "try")], capture_output=True).returncode == 0


def instruction_sets() -> list[str]:
    """Names in SETS that this machine's compiler can target."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    wanted = os.environ.get("PYGLOBENC_SETS")
    if wanted:
        return [name for name in SETS if name in wanted.split(",")]
    return list(SETS) if x86 else ["portable"]


def build_file(compiler: list[str], output: Path, folder: Path) -> str:
    """Text of build.ninja."""
    import pybind11

    sets = instruction_sets()
    flags = [*FLAGS, *QUIET, *os.environ.get("PYGLOBENC_CXX_FLAGS", "").split()]
    flags += [f"-DPYGLOBENC_HAS_{name.upper()}" for name in sets]
    if accepts(compiler, "-fopenmp", folder):
        flags.append("-fopenmp")
    link = [*flags, "-shared", *(["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else [])]
    includes = [f"-isystem {path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    lines = [
        "rule compile",
        f"  command = {' '.join([*compiler, *flags])} $extra -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {' '.join([*compiler, *link])} $in -o $out",
    ]
    objects = []

    def add(source: Path, name: str, extra: list[str]) -> None:
        objects.append(name)
        lines.extend([f"build {name}: compile {source.resolve()}", f"  extra = {' '.join(extra)}"])

    # the portable objects come first: of functions that several objects define, the linker takes the first
    for isa in sets:
        for op in OPS:
            add(CPU / f"{op}.cpp", f"{op}.{isa}.o", [*SETS[isa], f"-DPYGLOBENC_ISA={isa}"])
    add(CPU / "bindings.cpp", "bindings.o", includes)
    lines.append(f"build {output}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


class BuildWithNinja(build_ext):
    """Compiles the one extension with ninja; failures warn, since the extension is optional."""

    def run(self) -> None:
        # a module left from an earlier build must not pass for this one
        for ext in self.extensions:
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.unlink(missing_ok=True)
        if os.environ.get("PYGLOBENC_NO_EXTENSIONS", "0") not in ("", "0"):
            raise CompileError("left out, PYGLOBENC_NO_EXTENSIONS is set")
        compiler, ninja = find_compiler(), find_ninja()
        folder = Path(self.build_temp).resolve() / "cpu"
        folder.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(build_file(compiler, output, folder))
        done = subprocess.run([ninja, "-C", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise CompileError(f"ninja failed:\n{done.stdout[-4000:]}")


setup(
    ext_modules=[Extension("pyglobenc._cpu", [str(CPU / "bindings.cpp")], optional=True)],
    cmdclass={"build_ext": BuildWithNinja},
)
