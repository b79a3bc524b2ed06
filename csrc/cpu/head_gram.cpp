// head_gram: G[j][g, h] = v[g, j] K[g, h] v[h, j]^T for g <= h, mirrored, and c[j][h] = <projected[j, h], v[h, j]>.
//
// A register tile holds V vectors of tokens times J columns of v K, which are multiplied by v[h] and summed without being stored:
// n*d^2/2 multiply-adds, n*d floats of packed values.
#include "ops.h"
#include "pack.h"
#include "parallel.h"

namespace pyglobenc {
namespace PYGLOBENC_ISA {

constexpr int64_t BLOCKS = 4;  // blocks of tokens that share one packed K[g, h]

struct GramArgs {
    const View& v;       // [B, Hkv, n, dh]
    const View& kernel;  // [H, dh, H, dh]
    const View& gram;    // [B, n, H, H]
    int64_t H, group, dh, n, tokens;

    const float* block(const float* packed, int64_t index, int64_t h) const {
        return packed + (index * v.shape[1] + h / group) * dh * I;
    }
};

// Values of I tokens, all heads, to out [Hkv, dh, I]; 0 beyond the last token.
static void pack_values(const GramArgs& args, int64_t first, float* out) {
    const int64_t Hkv = args.v.shape[1], count = args.tokens - first < I ? args.tokens - first : I;
    if (count < I) std::memset(out, 0, sizeof(float) * Hkv * args.dh * I);
    for (int64_t h = 0; h < Hkv; ++h)
        for (int64_t l = 0; l < count; ++l)
            widen(args.v, (first + l) / args.n, h, (first + l) % args.n, out + h * args.dh * I + l, I);
}

// K[g, :, h, :] to out [panels, dh, J], 0 beyond the last column.
static void pack_kernel(const GramArgs& args, int64_t g, int64_t h, float* out) {
    for (int64_t first = 0; first < args.dh; first += J, out += args.dh * J)
        for (int64_t c = 0; c < args.dh; ++c)
            for (int64_t j = 0; j < J; ++j) out[c * J + j] = first + j < args.dh ? number(args.kernel, g, c, h, first + j) : 0.0f;
}

// sum over `count` columns of (left @ panel) * right, added to total.
static inline void add_panel(const float* left,   // [dh, I]
                             const float* panel,  // [dh, J]
                             const float* right,  // [count, I]
                             int64_t dh, int64_t count, Floats total[V]) {
    Floats acc[J][V] = {};
    for (int64_t c = 0; c < dh; ++c, left += I, panel += J) {
        Floats x[V];
        for (int v = 0; v < V; ++v) x[v] = load(left + v * W);
        for (int j = 0; j < J; ++j) {
            const Floats y = splat(panel[j]);
            for (int v = 0; v < V; ++v) acc[j][v] += x[v] * y;
        }
    }
    // summed within the panel first: fewer roundings at the size of the total
    Floats part[V] = {};
    for (int j = 0; j < J; ++j)
        if (j < count)
            for (int v = 0; v < V; ++v) part[v] += acc[j][v] * load(right + j * I + v * W);
    for (int v = 0; v < V; ++v) total[v] += part[v];
}

// Entries g, h of G for the blocks [first, last) of tokens.
static void gram_entries(const GramArgs& args, const float* values, int64_t first, int64_t last, int64_t g, int64_t h, float* panels) {
    pack_kernel(args, g, h, panels);
    float* const gram = static_cast<float*>(args.gram.data);
    for (int64_t block = first; block < last; ++block) {
        const float* left = args.block(values, block, g);
        const float* right = args.block(values, block, h);
        Floats total[V] = {};
        for (int64_t c = 0; c < args.dh; c += J)
            add_panel(left, panels + c * args.dh, right + c * I, args.dh, args.dh - c, total);
        float lanes[I];
        std::memcpy(lanes, total, sizeof lanes);
        for (int64_t l = 0, token = block * I; l < I && token < args.tokens; ++l, ++token) {
            gram[at(args.gram, token / args.n, token % args.n, g, h)] = lanes[l];
            gram[at(args.gram, token / args.n, token % args.n, h, g)] = lanes[l];
        }
    }
}

// Products of two vectors of count floats, summed.
static inline float dot(const float* a, const float* b, int64_t count) {
    Floats total = {};
    int64_t c = 0;
    for (; c + W <= count; c += W) {
        Floats x, y;
        std::memcpy(&x, a + c, sizeof x);
        std::memcpy(&y, b + c, sizeof y);
        total += x * y;
    }
    float out = sum(total);
    for (; c < count; ++c) out += a[c] * b[c];
    return out;
}

static void cross_terms(const GramArgs& args, const View& projected, const View& cross, int64_t first, int64_t last) {
    for (int64_t token = first; token < last; ++token)
        for (int64_t h = 0; h < args.H; ++h) {
            const int64_t b = token / args.n, j = token % args.n;
            const float* a = static_cast<const float*>(projected.data) + at(projected, b, j, h * args.dh);
            const float* v = static_cast<const float*>(args.v.data) + at(args.v, b, h / args.group, j);
            static_cast<float*>(cross.data)[at(cross, b, j, h)] = dot(a, v, args.dh);
        }
}

void head_gram(const View& v, const View& kernel, const View& projected, const View& gram, const View& cross, int threads) {
    const int64_t H = kernel.shape[0], dh = v.shape[3], n = v.shape[2], tokens = v.shape[0] * n;
    const GramArgs args{v, kernel, gram, H, H / v.shape[1], dh, n, tokens};
    const int64_t blocks = (tokens + I - 1) / I, groups = (blocks + BLOCKS - 1) / BLOCKS;
    const int64_t values = blocks * v.shape[1] * dh * I, panels = aligned((dh + J - 1) / J * J * dh);
    threads = tokens * H * dh * H * dh < SERIAL ? 1 : threads;
    const Memory memory(4 * (values + threads * panels));
    float* const packed = memory.as<float>();
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float* const mine = packed + values + thread() * panels;
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; ++block) {
            pack_values(args, block * I, packed + block * v.shape[1] * dh * I);
            if (projected) cross_terms(args, projected, cross, block * I, tokens < (block + 1) * I ? tokens : (block + 1) * I);
        }
        // the longest rows of the triangle first
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < H * groups; ++item) {
            const int64_t g = item / groups, first = item % groups * BLOCKS;
            for (int64_t h = g; h < H; ++h) gram_entries(args, packed, first, blocks < first + BLOCKS ? blocks : first + BLOCKS, g, h, mine);
        }
    }
}

}  // namespace PYGLOBENC_ISA
}  // namespace pyglobenc
