// exp: the kernels' exponential on an array, so that its error can be tested.
#include "ops.h"
#include "simd.h"

namespace pyglobenc {
namespace PYGLOBENC_ISA {

void exp(const float* x, float* out, int64_t count) {
    for (int64_t i = 0; i < count; i += W) {
        const int64_t rest = count - i < W ? count - i : W;
        Floats lanes = {};
        std::memcpy(&lanes, x + i, sizeof(float) * rest);
        lanes = exp(lanes);
        std::memcpy(out + i, &lanes, sizeof(float) * rest);
    }
}

}  // namespace PYGLOBENC_ISA
}  // namespace pyglobenc
