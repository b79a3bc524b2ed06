// head_gram: computes G[j][h][g] = v[h, j] K[h, g] v[g, j]^T and c[j][h] = v[h, j] P[h] x[j]^T (Modarressi et
// al., 2022, eq. 6 to 10, expanded).
//
// G takes n * d^2 / 2 multiply-adds, and c takes n * d^2. torch's GEMMs take as many, but need two launches
// for every head, about 60 for a layer of BERT-base, and write v K to memory.
#include "ops.h"
#include "value_tile.h"

namespace pyglobenc {
namespace {

// The number of blocks that a multiprocessor holds. Without this number, ptxas spills registers on sm_80 to
// fit four blocks in half precision.
template <class V>
constexpr int MIN_BLOCKS = sizeof(V) == 2 ? 2 : 0;

template <class T, class V>
KERNEL(VALUE_THREADS, MIN_BLOCKS<V>)
head_gram_kernel(ValueArgs p) {
    const WarpTokens<V> tokens(p);
    const int h = tokens.head, d = p.head_dim;
    const float* matrix = static_cast<const float*>(p.matrix.data) + int64_t(h) * d * p.heads * d;
    float* gram = static_cast<float*>(p.out.data) + tokens.b * int64_t(p.n) * p.heads * p.heads;
    for (int g = h; g < p.heads; ++g) {
        float sums[2] = {};
        add_products<T>(p, tokens, matrix + g * d, int64_t(p.heads) * d, d, tokens.values(p, g),
                        p.v.stride[2], sums);
        add_lanes(sums);
        for (int half = 0; half < 2; ++half) {
            if (lane() % 4 || tokens.row(half) >= p.n) continue;
            float* const to = gram + int64_t(tokens.row(half)) * p.heads * p.heads;
            to[h * p.heads + g] = to[g * p.heads + h] = sums[half];
        }
    }
    if (!p.x.data) return;
    const V* x = static_cast<const V*>(p.x.data) + tokens.b * p.x.stride[0];
    const float* cross = static_cast<const float*>(p.cross.data) + int64_t(h) * d * p.width;
    float sums[2] = {};
    add_products<T>(p, tokens, cross, p.width, p.width, x, p.x.stride[1], sums);
    add_lanes(sums);
    float* out = static_cast<float*>(p.out_cross.data) + tokens.b * int64_t(p.n) * p.heads + h;
    for (int half = 0; half < 2; ++half)
        if (lane() % 4 == 0 && tokens.row(half) < p.n) out[int64_t(tokens.row(half)) * p.heads] = sums[half];
}

template <class V>
void run(const ValueArgs& p, bool exact, void* stream) {
    if (exact)
        launch(head_gram_kernel<float, V>, value_blocks(p), VALUE_THREADS, VALUE_BYTES<float>, stream, p);
    else
        launch(head_gram_kernel<tf32, V>, value_blocks(p), VALUE_THREADS, VALUE_BYTES<tf32>, stream, p);
}

}  // namespace

void head_gram(const ValueArgs& p, bool exact, void* stream) {
    if (p.v.type == Type::f32)
        run<float>(p, exact, stream);
    else if (p.v.type == Type::f16)
        run<f16>(p, exact, stream);
    else
        run<bf16>(p, exact, stream);
}

}  // namespace pyglobenc
