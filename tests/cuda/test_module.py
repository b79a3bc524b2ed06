"""The compiled module where there is no driver."""

import subprocess
import sys

import pytest
import torch

from pyglobenc.backends.cuda import _extension

compiled = pytest.mark.skipif(_extension.kernels is None, reason="the compiled module is missing")
without_driver = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@compiled
def test_import_touches_no_driver():
    # the module alone, found beside the package: importing that would take torch's seconds
    path = _extension.kernels.__file__
    code = (
        f"import importlib.util as u; s = u.spec_from_file_location('_cuda', {path!r}); "
        f"s.loader.exec_module(u.module_from_spec(s))"
    )
    libraries = "print(open('/proc/self/maps').read())"
    done = subprocess.run([sys.executable, "-c", f"{code}; {libraries}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert path in done.stdout and "libcuda" not in done.stdout


@compiled
@without_driver
def test_every_use_is_an_error_that_says_why():
    kernels, t = _extension.kernels, torch.zeros(1, 2, 3, 16)
    assert kernels.problem()
    for question in (kernels.processors, kernels.shared_limit):
        with pytest.raises(RuntimeError, match="CUDA: current device: .*driver"):
            question()
    with pytest.raises(RuntimeError, match="CUDA: launch: .*driver"):
        kernels.head_norms((t, torch.zeros(2, 16, 8), None, None, torch.zeros(1, 3, 2), None), True, 0)


@without_driver
def test_reasons_on_the_cpu():
    (reason,) = _extension.device_reasons({"q": torch.zeros(1), "k": None})
    assert reason.startswith(
        "needs tensors on a GPU, got cpu (" if _extension.kernels else "the compiled module pyglobenc._cuda"
    )


def test_reason_without_the_module(monkeypatch):
    monkeypatch.setattr(_extension, "kernels", None)
    monkeypatch.setattr(_extension, "missing", "no module", raising=False)
    assert _extension.device_reasons({"q": torch.zeros(1)}) == ["no module"]
