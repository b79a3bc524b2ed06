// project: computes the product of each token with one vector and, if wanted, the token's L2 norm, in one pass
// over memory.
#include <cmath>

#include "division.h"
#include "ops.h"
#include "pack.h"

namespace pyglobenc {
namespace PYGLOBENC_ISA {

// With fewer numbers, a second thread takes longer to start than to read its share.
constexpr int64_t FEW = int64_t(1) << 18;

static void project_token(const View& t, int64_t first, const float* u, bool length, float* product,
                          float* norm) {
    const int64_t heads = t.shape[2], dh = t.shape[3];
    // Two sums, because an addition waits for the one before it.
    Floats dot[2] = {}, square[2] = {};
    for (int64_t h = 0; h < heads; ++h)
        vectors(0, dh, [&](int64_t c, int64_t lanes) {
            const Floats value = load_some(t, first + h * t.stride[2] + c, lanes);
            const int64_t odd = c / W % 2;
            dot[odd] += value * load_some(u + h * dh + c, lanes);
            if (length) square[odd] += value * value;
        });
    *product = sum(dot[0] + dot[1]);
    if (length) *norm = std::sqrt(sum(square[0] + square[1]));
}

void project(const View& t, const View& u, const View& out, int threads) {
    const int64_t n = t.shape[1], tokens = t.shape[0] * n;
    const bool length = out.shape[0] > 1;
    float* const products = static_cast<float*>(out.data);
    const float* const direction = static_cast<const float*>(u.data);
    threads = tokens * t.shape[2] * t.shape[3] < FEW ? 1 : threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t token = 0; token < tokens; ++token)
        project_token(t, at(t, token / n, token % n), direction, length, products + token,
                      products + tokens + token);
}

}  // namespace PYGLOBENC_ISA
}  // namespace pyglobenc
