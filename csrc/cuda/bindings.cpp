// Defines the Python module pyglobenc._cuda. The tests build it with PYGLOBENC_EMULATED, and the kernels then
// run on the CPU.
#include <pybind11/pybind11.h>

#include "../common/tensor.h"
#include "globenc_bindings.h"
#include "ops.h"
#include "relevance_bindings.h"
#ifdef PYGLOBENC_EMULATED
#include "../common/fibers.h"
#endif

namespace py = pybind11;

PYBIND11_MODULE(_cuda, m) {
    using namespace pyglobenc;
    m.doc() = "CUDA kernels; see pyglobenc/backends/cuda for the launchers.";
    m.def("problem", problem, "Return why no kernel can run here, or an empty string if kernels run.");
    m.def("shared_limit", shared_limit,
          "Return the bytes of shared memory that a block may have on the current device.");
    m.def("processors", processors, "Return the number of multiprocessors of the current device.");
    bind_globenc(m);
    bind_relevance(m);
#ifdef PYGLOBENC_EMULATED
    m.attr("emulated") = true;
    m.def(
        "machine",
        [](bool reversed, int shared_limit, int processors) {
            emulated::machine.reversed = reversed;
            emulated::machine.shared_limit = shared_limit;
            emulated::machine.processors = processors;
        },
        py::arg("reversed") = false, py::arg("shared_limit") = 227 * 1024, py::arg("processors") = 2,
        "Set the properties of the emulated device.");
    m.def(
        "launches",
        [] {
            py::list out;
            for (const auto& launch : emulated::machine.launches)
                out.append(py::make_tuple(launch.blocks, launch.threads, launch.bytes));
            emulated::machine.launches.clear();
            return out;
        },
        "Return (blocks, threads, bytes of shared memory) of each launch since the last call.");
#else
    m.attr("emulated") = false;
#endif
}
