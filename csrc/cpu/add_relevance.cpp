// add_relevance: R_a = a R / safe(a + b), R_b = b R / safe(a + b), each rescaled to its share of the
// example's relevance.
//
// The sums are taken in double precision, for each stretch of the array, and then added in a fixed order. So
// they do not depend on the number of threads.
#include "division.h"
#include "ops.h"

namespace pyglobenc {
namespace PYGLOBENC_ISA {

struct Sums {
    double a, b, total;
};

static inline void accumulate(double* lanes, Floats x) {
    for (int l = 0; l < W; ++l) lanes[l] += double(x[l]);
}

static inline double sum(const double* lanes) {
    double out = 0;
    for (int l = 0; l < W; ++l) out += lanes[l];
    return out;
}

static void split(const float* r, const float* a, const float* b, float* out_a, float* out_b, int64_t first,
                  int64_t last, float stabilizer, Sums* sums) {
    double lanes[3][W] = {};
    vectors(first, last, [&](int64_t i, int64_t count) {
        const Floats x = load_some(a + i, count), y = load_some(b + i, count),
                     relevance = load_some(r + i, count);
        const Floats s = safe_divide(relevance, x + y, stabilizer);
        const Floats left = x * s, right = y * s;
        store_some(out_a + i, left, count);
        store_some(out_b + i, right, count);
        if (!sums) return;
        accumulate(lanes[0], left);
        accumulate(lanes[1], right);
        accumulate(lanes[2], relevance);
    });
    if (sums) *sums = Sums{sum(lanes[0]), sum(lanes[1]), sum(lanes[2])};
}

void add_relevance(const float* r, const float* a, const float* b, float* out_a, float* out_b, int64_t batch,
                   int64_t count, float stabilizer, bool rescale, int threads) {
    const int64_t parts = (count + STRETCH - 1) / STRETCH;
    const Memory memory(sizeof(Sums) * parts);
    Sums* const sums = memory.as<Sums>();
    for (int64_t example = 0; example < batch;
         ++example, r += count, a += count, b += count, out_a += count, out_b += count) {
        stretches(count, threads, [=](int64_t part, int64_t first, int64_t last) {
            split(r, a, b, out_a, out_b, first, last, stabilizer, rescale ? sums + part : nullptr);
        });
        if (!rescale) continue;
        Sums all = {0, 0, 0};
        for (int64_t part = 0; part < parts; ++part) {
            all.a += sums[part].a;
            all.b += sums[part].b;
            all.total += sums[part].total;
        }
        const double both = __builtin_fabs(all.a) + __builtin_fabs(all.b);
        const float left = float(safe_divide(safe_divide(__builtin_fabs(all.a), both) * all.total, all.a));
        const float right = float(safe_divide(safe_divide(__builtin_fabs(all.b), both) * all.total, all.b));
        stretches(count, threads, [=](int64_t, int64_t first, int64_t last) {
            vectors(first, last, [=](int64_t i, int64_t lanes) {
                store_some(out_a + i, load_some(out_a + i, lanes) * left, lanes);
                store_some(out_b + i, load_some(out_b + i, lanes) * right, lanes);
            });
        });
    }
}

}  // namespace PYGLOBENC_ISA
}  // namespace pyglobenc
