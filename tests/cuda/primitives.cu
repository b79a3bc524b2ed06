// Kernels of single primitives of simt.h, for test_primitives.py.
#include <cstring>

#include "../../csrc/cuda/launch.h"

namespace pyglobenc {
namespace {

// What each lane holds: a [32, 4], b [32, 2], c [32, 4] in and out.
template <class T>
KERNEL(32)
mma_kernel(const uint32_t* a, const uint32_t* b, float* c) {
    uint32_t left[4], right[2];
    float sums[4];
    for (int e = 0; e < 4; ++e) left[e] = a[4 * lane() + e], sums[e] = c[4 * lane() + e];
    for (int e = 0; e < 2; ++e) right[e] = b[2 * lane() + e];
    mma<T>(sums, left, right);
    for (int e = 0; e < 4; ++e) c[4 * lane() + e] = sums[e];
}

// Four matrices of 8 x 8 entries of 2 bytes; out [32, 4].
KERNEL(32) load_kernel(const uint32_t* matrices, uint32_t* out, bool transposed) {
    uint32_t* const held = reinterpret_cast<uint32_t*>(shared());
    for (int e = 0; e < 4; ++e) held[4 * lane() + e] = matrices[4 * lane() + e];
    warp_barrier();
    uint32_t r[4];
    if (transposed)
        load_matrices_transposed(r, held + 4 * lane());
    else
        load_matrices(r, held + 4 * lane());
    for (int e = 0; e < 4; ++e) out[4 * lane() + e] = r[e];
}

enum Between { NOTHING, BARRIER, WARP_BARRIER, SHUFFLE, HALF_A_BARRIER };

DEVICE void order(int between) {
    if (between == BARRIER) barrier();
    if (between == WARP_BARRIER) warp_barrier();
    if (between == SHUFFLE) shuffle(0, 0);
    if (between == HALF_A_BARRIER && thread() < 32) barrier();
}

// Threads write their own word of shared memory, or have it copied. They read the word of the thread that is
// `ahead` of them, before or after.
KERNEL(64)
exchange_kernel(const float* in, float* out, int between, int ahead, bool copied, bool read_first) {
    float* const held = reinterpret_cast<float*>(shared());
    const int other = (thread() + ahead) % threads();
    if (read_first) {
        out[thread()] = held[other];
        order(between);
    }
    if (copied) {
        copy_async<4>(held + thread(), in + thread(), true);
        commit_copies();
        wait_copies<0>();
    } else {
        held[thread()] = in[thread()];
    }
    if (read_first) return;
    order(between);
    out[thread()] = held[other];
}

// What went wrong, to the caller's 200 characters.
template <class F>
void run(char* error, F&& body) {
    error[0] = 0;
    try {
        body();
    } catch (const std::exception& caught) {
        std::strncpy(error, caught.what(), 199);
    }
}

}  // namespace
}  // namespace pyglobenc

using namespace pyglobenc;

extern "C" void run_mma(char* error, int kind, const uint32_t* a, const uint32_t* b, float* c) {
    run(error, [&] {
        launch(kind == 0   ? mma_kernel<bf16>
               : kind == 1 ? mma_kernel<f16>
                           : mma_kernel<tf32>,
               1, 32, 0, nullptr, a, b, c);
    });
}

extern "C" void run_load(char* error, const uint32_t* matrices, uint32_t* out, int transposed) {
    run(error, [&] { launch(load_kernel, 1, 32, 512, nullptr, matrices, out, transposed != 0); });
}

extern "C" void run_exchange(char* error, const float* in, float* out, int between, int ahead, int copied,
                             int read_first) {
    run(error, [&] {
        launch(exchange_kernel, 1, 64, 256, nullptr, in, out, between, ahead, copied != 0, read_first != 0);
    });
}
