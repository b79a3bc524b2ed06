// proximity: computes, for each row t and key j,
//
//   out[t, j] = max(0, |y[t]|_1 - |y[t] - F|_1),   F = sum_h alpha[h, t, j] f[h, j]
//
// (Ferrando et al., 2022.) Each feature adds min(s, 2 |y| - s), with s = F where y >= 0 and -F
// elsewhere, so that the rounding error depends on F and not on the larger y. A warp takes a key and ROWS
// rows, and its lanes take the features. F stays in registers. The kernel takes T*n*d*H multiply-adds.
#include "division.h"
#include "launch.h"
#include "ops.h"

namespace pyglobenc {
namespace {

constexpr int PROXIMITY_THREADS = 128, KEYS_OF_BLOCK = PROXIMITY_THREADS / 32;
constexpr int ROWS = 8, EACH = 4;  // rows of a warp, and features that a lane takes at once

// Returns |y| - |y - F| of one feature.
DEVICE float nearer(float F, float y) {
    const float s = from_bits(bits(F) ^ (bits(y) & 0x80000000u)), other = 2 * magnitude(y) - s;
    return s < other ? s : other;
}

// Copies the factors of one key to shared memory, [H, ROWS], with 0 past the last row. Returns whether one of
// them is not 0.
DEVICE bool copy_factors(const ProximityArgs& p, int64_t b, int t, int j, float* alpha) {
    const int rows = int(p.y.shape[1]) - t;
    const float* const from = static_cast<const float*>(p.alpha.data) + b * p.alpha.stride[0] +
                              int64_t(t) * p.alpha.stride[2] + int64_t(j) * p.alpha.stride[3];
    bool seen = false;
    for (int at = lane(); at < int(p.f.shape[1]) * ROWS; at += 32) {
        const int r = at % ROWS;
        alpha[at] = r < rows ? from[at / ROWS * p.alpha.stride[1] + r * p.alpha.stride[2]] : 0.0f;
        seen |= alpha[at] != 0;
    }
    warp_barrier();
    return any(seen);
}

KERNEL(PROXIMITY_THREADS) proximity_kernel(ProximityArgs p) {
    const int heads = int(p.f.shape[1]), keys = int(p.f.shape[2]), width = int(p.f.shape[3]),
              rows = int(p.y.shape[1]);
    const int key_blocks = (keys + KEYS_OF_BLOCK - 1) / KEYS_OF_BLOCK, row_blocks = (rows + ROWS - 1) / ROWS;
    const int j = block() % key_blocks * KEYS_OF_BLOCK + warp(),
              t = block() / key_blocks % row_blocks * ROWS;
    const int64_t b = block() / key_blocks / row_blocks;
    if (j >= keys) return;
    float* const alpha = reinterpret_cast<float*>(shared()) + warp() * heads * ROWS;
    const bool seen = copy_factors(p, b, t, j, alpha);
    const float* const f =
        static_cast<const float*>(p.f.data) + b * p.f.stride[0] + int64_t(j) * p.f.stride[2];
    const float* const y =
        static_cast<const float*>(p.y.data) + b * p.y.stride[0] + int64_t(t) * p.y.stride[1];
    float total[ROWS] = {};
    for (int c = lane(); c < width && seen; c += 32 * EACH) {
        float acc[ROWS][EACH] = {};
        for (int h = 0; h < heads; ++h) {
            float x[EACH];
            UNROLL
            for (int e = 0; e < EACH; ++e) x[e] = c + 32 * e < width ? f[h * p.f.stride[1] + c + 32 * e] : 0;
            UNROLL
            for (int r = 0; r < ROWS; ++r) UNROLL
                for (int e = 0; e < EACH; ++e) acc[r][e] = fmaf(alpha[h * ROWS + r], x[e], acc[r][e]);
        }
        UNROLL
        for (int r = 0; r < ROWS; ++r) UNROLL
            for (int e = 0; e < EACH; ++e)
                if (t + r < rows && c + 32 * e < width)
                    total[r] += nearer(acc[r][e], y[r * p.y.stride[1] + c + 32 * e]);
    }
    float* const out = static_cast<float*>(p.out.data) + b * p.out.stride[0] +
                       int64_t(t) * p.out.stride[1] + int64_t(j) * p.out.stride[2];
    UNROLL
    for (int r = 0; r < ROWS; ++r) {
        const float value = positive_part(sum_over_warp(total[r]));
        if (lane() == r && t + r < rows) out[r * p.out.stride[1]] = value;
    }
}

}  // namespace

void proximity(const ProximityArgs& p, void* stream) {
    const int64_t key_blocks = (p.f.shape[2] + KEYS_OF_BLOCK - 1) / KEYS_OF_BLOCK,
                  row_blocks = (p.y.shape[1] + ROWS - 1) / ROWS;
    const int bytes = KEYS_OF_BLOCK * ROWS * int(p.f.shape[1] * sizeof(float));
    launch(proximity_kernel, p.f.shape[0] * row_blocks * key_blocks, PROXIMITY_THREADS, bytes, stream, p);
}

}  // namespace pyglobenc
