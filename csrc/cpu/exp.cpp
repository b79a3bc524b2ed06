// exp: applies the kernels' exponential to an array, to test its error and measure its speed.
#include "division.h"
#include "ops.h"

namespace pyglobenc {
namespace PYGLOBENC_ISA {

void exp(const float* x, float* out, int64_t count, int threads) {
    stretches(count, threads, [=](int64_t, int64_t first, int64_t last) {
        vectors(first, last,
                [=](int64_t i, int64_t lanes) { store_some(out + i, exp(load_some(x + i, lanes)), lanes); });
    });
}

}  // namespace PYGLOBENC_ISA
}  // namespace pyglobenc
