"""The emulated kernels in the place of the compiled ones."""

import emulator
import pytest

from pyglobenc.backends.cuda import _extension, _pairs


@pytest.fixture(scope="session")
def emulated_module(tmp_path_factory):
    return emulator.build(tmp_path_factory.mktemp("emulator"))


@pytest.fixture
def emulated(emulated_module, monkeypatch):
    """backend="cuda" runs emulated, on CPU tensors; machine() sets the order of threads and the device's
    limits.
    """
    change = emulated_module.machine

    def machine(**settings):
        change(**settings)
        _pairs.pair_tile.cache_clear()
        _pairs.processors.cache_clear()

    monkeypatch.setattr(emulated_module, "machine", machine)
    monkeypatch.setattr(_extension, "kernels", emulated_module)
    emulated_module.machine()
    emulated_module.launches()
    return emulated_module
