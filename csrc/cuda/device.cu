// Reads properties of the current device.
#include "launch.h"
#include "ops.h"

namespace pyglobenc {

#if defined(__CUDACC__)

std::string problem() {
    int count = 0, driver = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (status == cudaSuccess) return "";
    return cudaDriverGetVersion(&driver) == cudaSuccess && !driver ? "no CUDA driver"
                                                                   : cudaGetErrorString(status);
}

static int attribute(cudaDeviceAttr which) {
    int device = 0, value = 0;
    check(cudaGetDevice(&device), "current device");
    check(cudaDeviceGetAttribute(&value, which, device), "device attribute");
    return value;
}

int shared_limit() { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }
int processors() { return attribute(cudaDevAttrMultiProcessorCount); }

#else

std::string problem() { return ""; }
int shared_limit() { return emulated::machine.shared_limit; }
int processors() { return emulated::machine.processors; }

#endif

}  // namespace pyglobenc
