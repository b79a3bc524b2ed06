// head_gram: G[j][g, h] = v[g, j] K[g, h] v[h, j]^T for g <= h, mirrored, and c[j][h] = <projected[j, h], v[h, j]>.
//
// A register tile holds V vectors of tokens times J columns of v K, which are multiplied by v[h] and summed without being stored:
// n*d^2/2 multiply-adds, n*d floats of packed values.
#include "ops.h"
#include "pack.h"
#include "parallel.h"

namespace pyglobenc {
namespace PYGLOBENC_ISA {

constexpr int64_t SHARED = 4 << 20;  // bytes of values, at most, that share one packed K[g, h]

struct GramArgs {
    const View& v;       // [B, Hkv, n, dh]
    const View& kernel;  // [H, dh, H, dh]
    const View& gram;    // [B, n, H, H]
    int64_t H, group, dh, n, tokens;

    const float* block(const float* packed, int64_t index, int64_t h) const {
        return packed + (index * v.shape[1] + h / group) * dh * I;
    }
};

// Walks the tokens of a batch in order, without a division for each.
struct Token {
    int64_t b, j, n;

    Token(int64_t index, int64_t n) : b(index / n), j(index % n), n(n) {}

    void next() {
        if (++j == n) {
            j = 0;
            ++b;
        }
    }
};

// Values of I tokens, all heads, to out [Hkv, dh, I]; 0 beyond the last token.
static void pack_values(const GramArgs& args, int64_t first, float* out) {
    const int64_t Hkv = args.v.shape[1], count = args.tokens - first < I ? args.tokens - first : I;
    if (count < I) std::memset(out, 0, sizeof(float) * Hkv * args.dh * I);
    Token token(first, args.n);
    for (int64_t l = 0; l < count; ++l, token.next())
        for (int64_t h = 0; h < Hkv; ++h) widen(args.v, token.b, h, token.j, out + h * args.dh * I + l, I);
}

// K[g, :, h, :] to out [panels, dh, J], 0 beyond the last column. The last axis of K is contiguous.
static void pack_kernel(const GramArgs& args, int64_t g, int64_t h, float* out) {
    for (int64_t c = 0; c < args.dh; ++c) {
        const float* row = static_cast<const float*>(args.kernel.data) + at(args.kernel, g, c, h);
        float* to = out + c * J;
        for (int64_t first = 0; first < args.dh; first += J, row += J, to += args.dh * J) {
            const int64_t count = args.dh - first;
            for (int j = 0; j < J; ++j) to[j] = j < count ? row[j] : 0.0f;
        }
    }
}

// sum over the first C columns of (left @ panel) * right, added to total.
template <int C>
__attribute__((noinline)) static void add_columns(const float* left,   // [dh, I]
                               const float* panel,  // [dh, J]
                               const float* right,  // [C, I]
                               int64_t dh, Floats total[V]) {
    Floats acc[C][V] = {};
    for (int64_t c = 0; c < dh; ++c, left += I, panel += J) {
        Floats x[V];
        for (int v = 0; v < V; ++v) x[v] = load(left + v * W);
        for (int j = 0; j < C; ++j) {
            const Floats y = splat(panel[j]);
            for (int v = 0; v < V; ++v) acc[j][v] += x[v] * y;
        }
    }
    // summed within the panel first: fewer roundings at the size of the total
    Floats part[V] = {};
    for (int j = 0; j < C; ++j)
        for (int v = 0; v < V; ++v) part[v] += acc[j][v] * load(right + j * I + v * W);
    for (int v = 0; v < V; ++v) total[v] += part[v];
}

// The same for a last panel of fewer columns, in twos.
static inline void add_panel(const float* left, const float* panel, const float* right, int64_t dh, int64_t columns, Floats total[V]) {
    if (columns >= J) return add_columns<J>(left, panel, right, dh, total);
    if (columns >= 4) {
        add_columns<4>(left, panel, right, dh, total);
        panel += 4, right += 4 * I, columns -= 4;
    }
    if (columns >= 2) {
        add_columns<2>(left, panel, right, dh, total);
        panel += 2, right += 2 * I, columns -= 2;
    }
    if (columns == 1) add_columns<1>(left, panel, right, dh, total);
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
        Token token(block * I, args.n);
        const int64_t count = args.tokens - block * I < I ? args.tokens - block * I : I;
        for (int64_t l = 0; l < count; ++l, token.next()) {
            gram[at(args.gram, token.b, token.j, g, h)] = lanes[l];
            gram[at(args.gram, token.b, token.j, h, g)] = lanes[l];
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
    Token token(first, args.n);
    for (int64_t index = first; index < last; ++index, token.next())
        for (int64_t h = 0; h < args.H; ++h) {
            const float* a = static_cast<const float*>(projected.data) + at(projected, token.b, token.j, h * args.dh);
            const float* v = static_cast<const float*>(args.v.data) + at(args.v, token.b, h / args.group, token.j);
            static_cast<float*>(cross.data)[at(cross, token.b, token.j, h)] = dot(a, v, args.dh);
        }
}

void head_gram(const View& v, const View& kernel, const View& projected, const View& gram, const View& cross, int threads) {
    const int64_t H = kernel.shape[0], dh = v.shape[3], n = v.shape[2], tokens = v.shape[0] * n;
    const GramArgs args{v, kernel, gram, H, H / v.shape[1], dh, n, tokens};
    const int64_t blocks = (tokens + I - 1) / I, block_bytes = int64_t(sizeof(float)) * v.shape[1] * dh * I;
    // with one group of blocks the H rows of the triangle are the tasks: enough for H / 4 threads
    const int64_t share = blocks * H / (4 * threads) + 1, fits = SHARED / block_bytes + 1, most = share < fits ? share : fits;
    const int64_t groups = (blocks + most - 1) / most;
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
            const int64_t g = item / groups, first = item % groups * most, last = blocks < first + most ? blocks : first + most;
            for (int64_t h = g; h < H; ++h) gram_entries(args, packed, first, last, g, h, mine);
        }
    }
}

}  // namespace PYGLOBENC_ISA
}  // namespace pyglobenc
