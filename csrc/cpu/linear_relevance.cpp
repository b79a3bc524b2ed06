// linear_relevance: computes the two steps before and after the GEMMs of the Linear rule. Each step takes one
// pass over memory.
#include "division.h"
#include "ops.h"

namespace pyglobenc {
namespace PYGLOBENC_ISA {

// Computes s = R / safe(Z), where Z = (output - bias + bound) / 2 and bound = |x| |W|^T. An output whose Z is
// below the fraction `least` of bound + |bias| has lost its digits. It gets s = 0 and a mark in `dead`. s may
// be the same memory as bound. Returns the number of marks.
int64_t linear_quotient(const float* r,       // [rows, width]
                        const float* output,  // [rows, width] x W^T + bias
                        const float* bias,    // [width] or null
                        const float* bound,   // [rows, width]
                        float least, int64_t rows, int64_t width, float* s, uint8_t* dead, int threads) {
    const int64_t block = STRETCH / width > 1 ? STRETCH / width : 1, parts = (rows + block - 1) / block;
    const Memory memory(sizeof(int64_t) * parts);
    int64_t* const counts = memory.as<int64_t>();
    threads = parts < 4 ? 1 : threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t part = 0; part < parts; ++part) {
        Ints found = {};
        for (int64_t row = part * block; row < rows && row < (part + 1) * block; ++row) {
            const int64_t at = row * width;
            vectors(0, width, [&](int64_t i, int64_t lanes) {
                Floats limit = load_some(bound + at + i, lanes),
                       z = load_some(output + at + i, lanes) + limit;
                if (bias) {
                    const Floats shift = load_some(bias + i, lanes);
                    z -= shift;
                    limit += magnitude(shift);
                }
                z *= 0.5f;
                const Floats relevance = load_some(r + at + i, lanes);
                const Ints lost = (z < least * limit) & (relevance != 0);
                store_some(s + at + i, lost ? Floats{} : safe_divide(relevance, z, 0), lanes);
                for (int64_t l = 0; l < lanes; ++l) dead[at + i + l] = uint8_t(-lost[l]);
                found -= lost;
            });
        }
        counts[part] = 0;
        for (int l = 0; l < W; ++l) counts[part] += found[l];
    }
    int64_t total = 0;
    for (int64_t part = 0; part < parts; ++part) total += counts[part];
    return total;
}

// Computes out = (x * signed_sums + |x| * abs_sums) / 2; out may be the same memory as either of the sums.
void linear_product(const float* x, const float* signed_sums, const float* abs_sums, float* out,
                    int64_t count, int threads) {
    stretches(count, threads, [=](int64_t, int64_t first, int64_t last) {
        vectors(first, last, [=](int64_t i, int64_t lanes) {
            const Floats value = load_some(x + i, lanes);
            const Floats total =
                value * load_some(signed_sums + i, lanes) + magnitude(value) * load_some(abs_sums + i, lanes);
            store_some(out + i, total * 0.5f, lanes);
        });
    });
}

}  // namespace PYGLOBENC_ISA
}  // namespace pyglobenc
