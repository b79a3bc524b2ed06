"""The op tests on a build of the kernels that checks every access and every undefined operation."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pair_cases import KERNELS

ROOT = Path(__file__).parents[2]
PAIRS = ("pair_norms", "rollout_step", "head_gram", "norm_terms", "exp")
RELEVANCE = ("relevance_attention", "relevance_rollout_step", "clone_relevance", "add_relevance")
OPS = (*PAIRS, *RELEVANCE, "linear_relevance", "projection", "proximity")
FILES = [f"test_{op}.py" for op in OPS]
ON_TILES = [f"test_{op}.py" for op in (*PAIRS, "linear_relevance", "matmul")]

# every branch of the kernels, few pairs: blocks and a block + 1, one token, masks, windows, strides, nothing
# at all
SELECTED = "(strided or padd or rows or empty or n1- or n13- or n65- or 17.9)"


def library(compiler: str, name: str) -> str | None:
    """Path of a sanitizer's runtime."""
    path = subprocess.run(
        [compiler, f"-print-file-name={name}"], capture_output=True, text=True
    ).stdout.strip()
    return path if os.path.isabs(path) else None


@pytest.mark.slow
@pytest.mark.skipif(bool(KERNELS[0].marks), reason="the compiled module is missing")
@pytest.mark.parametrize("emulated", [False, True], ids=["native", "tiles"])
def test_no_sanitizer_complains(tmp_path, emulated):
    compiler = shutil.which("g++")
    runtimes = [library(compiler, name) for name in ("libasan.so", "libubsan.so")] if compiler else [None]
    if None in runtimes:
        pytest.skip("needs g++ with its sanitizers")
    here = [kernel.values[0].partition("-")[2] for kernel in KERNELS if not kernel.marks]
    if emulated and "avx512" not in here:
        pytest.skip("the kernels on tiles need AVX-512 beside them")
    # Tiles in plain C++ take the place of a processor that has them.
    best = "amx" if emulated else next(name for name in here if name != "amx")
    # those give fused multiply-adds
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -O1 -fexpensive-optimizations"
    if emulated:
        flags += " -DPYGLOBENC_EMULATE_TILES"
    environment = os.environ | {
        "PYGLOBENC_SETS": best,
        "PYGLOBENC_CXX_FLAGS": flags,
        "CXX": compiler,
        "PYGLOBENC_NO_CUDA": "1",
    }
    build = [
        sys.executable,
        "setup.py",
        "-q",
        "build",
        "--build-base",
        str(tmp_path),
        "--build-lib",
        str(tmp_path / "lib"),
    ]
    done = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True)
    built = list((tmp_path / "lib" / "pyglobenc").glob("_cpu*"))
    assert built, done.stdout + done.stderr
    environment |= {
        "PYTHONPATH": str(tmp_path / "lib"),
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",
        "OMP_NUM_THREADS": "2",
    }
    script = (
        f"import sys, pytest, pyglobenc._cpu as m; assert m.__file__ == {str(built[0])!r}; "
        f"sys.exit(pytest.main(sys.argv[1:]))"
    )
    tests = [str(ROOT / "tests" / "ops" / name) for name in (ON_TILES if emulated else FILES)]
    options = [
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-k",
        f"cpu-{best} and not cpu-{best}bf16 and {SELECTED}",
    ]
    done = subprocess.run(
        [sys.executable, "-c", script, *tests, *options],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
