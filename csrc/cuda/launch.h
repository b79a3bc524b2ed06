// Starts kernels on the GPU. If a host compiler compiles this file, the kernels run on the CPU instead.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../common/simt.h"

namespace pyglobenc {

#if defined(__CUDACC__)

inline void check(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    // Otherwise the next launch would report this error as its own.
    cudaGetLastError();
    throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(status));
}

// Starts kernel(args...) on a grid of blocks, each with `bytes` of dynamic shared memory.
template <class... P, class... A>
void launch(void (*kernel)(P...), int64_t blocks, int threads, int bytes, void* stream, const A&... args) {
    if (blocks > INT32_MAX) throw std::runtime_error("CUDA: a grid of " + std::to_string(blocks) + " blocks");
    const void* entry = reinterpret_cast<const void*>(kernel);
    if (bytes > 48 * 1024)
        check(cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
              "shared memory");
    kernel<<<unsigned(blocks), threads, bytes, static_cast<cudaStream_t>(stream)>>>(P(args)...);
    check(cudaGetLastError(), "launch");
}

#else

template <class... P, class... A>
void launch(void (*kernel)(P...), int64_t blocks, int threads, int bytes, void*, const A&... args) {
    emulated::run(blocks, threads, bytes, [&] { kernel(P(args)...); });
}

#endif

}  // namespace pyglobenc
