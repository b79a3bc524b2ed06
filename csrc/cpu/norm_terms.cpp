// norm_terms: computes the terms of a stage's squared norms from each token's transformed vectors
//
//   f[h]    = v[h] W_O[h] M
//   G[g][h] = <f[g], f[h]>, computed for g <= h and mirrored
//   c[h]    = <f[h], x M>
//
// and the residual term |x M|^2.
//
// A block holds V vectors of tokens. The kernel computes a few features of f for all heads, multiplies the
// heads with one another, and goes on to the next features. So the features stay in the caches, and a token
// never has more than H * FEATURES entries of f. In total this takes n*d^2 + n*d*H^2/2 multiply-adds. On
// tiles the n*d^2 are products of parts, three for values of bfloat16 and six for those of float32. The rows
// of W M are computed once for each call. They take d^2 floats, half as much again on tiles, and the packed
// values and inputs take n*d floats each.
#include <algorithm>

#include "ops.h"
#include "parallel.h"
#include "products.h"

namespace pyglobenc {
namespace PYGLOBENC_ISA {

// The number of rows that are summed before the sum is added to a total. This rounds the large total less
// often.
constexpr int64_t CHUNK = 32;
// The number of tasks that keep the threads busy. If there are fewer blocks, their features are divided. The
// division depends on the number of blocks alone.
constexpr int64_t ENOUGH = 8;
// The features that are computed at a time, and those of them that are multiplied with one another in
// registers.
constexpr int64_t FEATURES = KEYS, GROUP = TILES ? 4 : J;

struct TermsArgs {
    const View& v;         // [B, Hkv, n, dh]
    const View& weight;    // [H, dh, d], the numbers of each feature contiguous
    const View& x;         // [B, n, d] or none
    const View& gammas;    // [count, d] contiguous, or none
    const View& gram;      // [B, n, H, H]
    const View& cross;     // [B, n, H] or none
    const View& residual;  // [B, n] or none

    int64_t heads() const { return gram.shape[2]; }
    int64_t dh() const { return v.shape[3]; }
    int64_t width() const { return heads() * dh(); }
    // The values, and one head's numbers of a feature's row, as the products read them.
    Unit unit() const { return TILES ? unit_of(v) : Unit::single; }
    int64_t value_units() const { return units(unit(), dh()); }
    int64_t row_units() const { return units(TILES ? Unit::three_parts : Unit::single, dh()); }
    int64_t features() const { return weight.shape[2]; }
    // The last tile is filled up with rows of zeros.
    int64_t rows() const { return (features() + FEATURES - 1) / FEATURES * FEATURES; }
    int64_t tokens() const { return v.shape[0] * v.shape[2]; }
    int64_t blocks() const { return (tokens() + I - 1) / I; }
    int64_t block_size() const { return (v.shape[1] * value_units() + (x ? rows() : 0)) * I; }
    // Returns the offset of a head's values in a packed block.
    int64_t values(int64_t h) const { return h / (heads() / v.shape[1]) * value_units() * I; }
    int64_t pairs() const { return heads() * (heads() + 1) / 2 + (x ? heads() : 0); }
    int64_t stages() const { return gammas ? gammas.shape[0] : 0; }
    const float* gamma(int64_t stage) const {
        return static_cast<const float*>(gammas.data) + stage * features();
    }
    const float* row(int64_t e) const {
        return static_cast<const float*>(weight.data) + e * weight.stride[2];
    }
};

// Writes the sums over CHUNK rows of W, and of W times the first gamma, to out [2, width].
static void sum_rows(const TermsArgs& args, int64_t first, float* out) {
    const int64_t width = args.width(),
                  last = first + CHUNK < args.features() ? first + CHUNK : args.features();
    std::memset(out, 0, sizeof(float) * 2 * width);
    for (int64_t e = first; e < last; ++e) {
        const float* __restrict const row = args.row(e);
        float* __restrict const sum = out, * __restrict const weighted = out + width;
        const float gamma = args.gamma(0)[e];
        for (int64_t c = 0; c < width; ++c) {
            sum[c] += row[c];
            weighted[c] += row[c] * gamma;
        }
    }
}

// Writes the mean of W over all rows to out[0], and that of (W - mean) * gamma to out[1]. sums, [chunks, 2,
// width], come from sum_rows.
static void column_means(const TermsArgs& args, const float* sums, int64_t chunks, float* out) {
    const int64_t width = args.width(), d = args.features();
    std::memset(out, 0, sizeof(float) * 2 * width);
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
        for (int64_t c = 0; c < 2 * width; ++c) out[c] += sums[chunk * 2 * width + c];
    double gamma = 0;
    for (int64_t e = 0; e < d; ++e) gamma += args.gamma(0)[e];
    const float mean = float(gamma / d);
    for (int64_t c = 0; c < width; ++c) {
        out[c] /= d;
        out[width + c] = out[width + c] / d - out[c] * mean;
    }
}

// Writes row e of W M to out [width]. means, [2, width], come from column_means.
static void map_row(const TermsArgs& args, int64_t e, const float* means, float* out) {
    const int64_t width = args.width(), stages = args.stages();
    if (e >= args.features()) {
        std::memset(out, 0, sizeof(float) * width);
        return;
    }
    const float* const row = args.row(e);
    if (stages == 0) {
        std::memcpy(out, row, sizeof(float) * width);
        return;
    }
    const float first = args.gamma(0)[e], second = stages > 1 ? args.gamma(1)[e] : 1;
    if (stages == 1)
        for (int64_t c = 0; c < width; ++c) out[c] = (row[c] - means[c]) * first;
    else
        for (int64_t c = 0; c < width; ++c)
            out[c] = ((row[c] - means[c]) * first - means[width + c]) * second;
}

// Writes row e of W M as the products read it, to out [H, row_units]. row [width] is scratch memory.
static void pack_row(const TermsArgs& args, int64_t e, const float* means, float* row, float* out) {
    if constexpr (!TILES) return map_row(args, e, means, out);
    map_row(args, e, means, row);
    View numbers;
    numbers.data = row;
    for (int64_t h = 0; h < args.heads(); ++h)
        take_row(numbers, Unit::three_parts, h * args.dh(), 1, args.dh(), out + h * args.row_units());
}

// Centers the x [d, I] of each token and multiplies it by a gamma.
static void center(float* x, const float* gamma, int64_t d) {
    Floats mean[V] = {};
    for (int64_t first = 0; first < d; first += CHUNK) {
        Floats part[V] = {};
        for (int64_t e = first; e < first + CHUNK && e < d; ++e)
            for (int v = 0; v < V; ++v) part[v] += load(x + e * I + v * W);
        for (int v = 0; v < V; ++v) mean[v] += part[v];
    }
    for (int v = 0; v < V; ++v) mean[v] *= splat(1.0f / d);
    for (int64_t e = 0; e < d; ++e)
        for (int v = 0; v < V; ++v)
            store(x + e * I + v * W, (load(x + e * I + v * W) - mean[v]) * splat(gamma[e]));
}

// Packs a block of tokens to out: the values [Hkv, dh, I], then x M [rows, I]. Also writes the squared norms
// of x M to args.residual.
static void pack_block(const TermsArgs& args, int64_t block, float* out) {
    const int64_t d = args.features();
    pack_values(args.v, args.unit(), block, out);
    if (!args.x) return;
    out += args.v.shape[1] * args.value_units() * I;
    const BlockTokens inputs(args.v, block, args.x.stride[0], args.x.stride[1]);
    pack_tokens(args.x, Unit::single, inputs.start, inputs.count, args.x.stride[2], d, out);
    std::memset(out + d * I, 0, sizeof(float) * (args.rows() - d) * I);
    for (int64_t stage = 0; stage < args.stages(); ++stage) center(out, args.gamma(stage), d);
    Floats square[V] = {};
    for (int64_t first = 0; first < d; first += CHUNK) {
        Floats part[V] = {};
        for (int64_t e = first; e < first + CHUNK && e < d; ++e)
            for (int v = 0; v < V; ++v) {
                const Floats x = load(out + e * I + v * W);
                part[v] += x * x;
            }
        for (int v = 0; v < V; ++v) square[v] += part[v];
    }
    const BlockTokens to(args.v, block, args.residual.stride[0], args.residual.stride[1]);
    float lanes[I];
    std::memcpy(lanes, square, sizeof lanes);
    for (int64_t l = 0; l < to.count; ++l) static_cast<float*>(args.residual.data)[to.start[l]] = lanes[l];
}

// Writes the features of one head's f, for VT vectors of tokens, to out [FEATURES, I].
template <int VT>
__attribute__((noinline)) static void transform(const float* values,  // [value_units, I]
                                                Unit unit,
                                                const float* rows,  // [FEATURES, row_units], `step` apart
                                                int64_t step, int64_t dh, float* out) {
#if TILES
    tile_products<VT>(values, parts(unit), rows, parts(Unit::three_parts), step, tile_width(dh), out, I);
#else
    (void)unit;
    Floats acc[J][VT];
    products<J, VT, Unit::single>(values, rows, step, dh, acc);
    UNROLL for (int j = 0; j < J; ++j) UNROLL for (int v = 0; v < VT; ++v)
        store(out + j * I + v * W, acc[j][v]);
#endif
}

// Adds the sum of left * right[h] over a group of features to total[h], for `count` heads.
template <int VT>
__attribute__((noinline)) static void add_products(const float* left,              // [GROUP, I]
                                                   const float* right,             // [count, FEATURES, I]
                                                   int64_t count, float* total) {  // [count, I]
    Floats own[GROUP][VT];
    UNROLL for (int j = 0; j < GROUP; ++j) UNROLL for (int v = 0; v < VT; ++v) own[j][v] =
        load(left + j * I + v * W);
    for (int64_t h = 0; h < count; ++h, right += FEATURES * I, total += I) {
        Floats part[VT];
        UNROLL for (int v = 0; v < VT; ++v) part[v] = own[0][v] * load(right + v * W);
        UNROLL for (int j = 1; j < GROUP; ++j) UNROLL for (int v = 0; v < VT; ++v) part[v] +=
            own[j][v] * load(right + j * I + v * W);
        UNROLL for (int v = 0; v < VT; ++v) store(total + v * W, load(total + v * W) + part[v]);
    }
}

// Writes a block's sums over the features [first, last) to out [pairs, I]: the upper triangle of G, row by
// row, and then c.
template <int VT>
static void block_terms(const TermsArgs& args, const float* packed, const float* rows, int64_t first,
                        int64_t last, float* f, float* out) {
    const int64_t H = args.heads(), dh = args.dh(), row = args.row_units();
    const float* const x = packed + args.v.shape[1] * args.value_units() * I;
    std::memset(out, 0, sizeof(float) * args.pairs() * I);
    for (int64_t e = first; e < last; e += FEATURES) {
        for (int64_t h = 0; h < H; ++h)
            transform<VT>(packed + args.values(h), args.unit(), rows + (e * H + h) * row, H * row, dh,
                          f + h * FEATURES * I);
        for (int64_t s = 0; s < FEATURES; s += GROUP) {
            float* total = out;
            for (int64_t g = 0; g < H; total += (H - g) * I, ++g)
                add_products<VT>(f + (g * FEATURES + s) * I, f + (g * FEATURES + s) * I, H - g, total);
            if (args.x) add_products<VT>(x + (e + s) * I, f + s * I, H, total);
        }
    }
}

// Adds up `parts` runs of sums [pairs, I], which lie `step` apart, and writes the totals to the tensors.
static void write_terms(const TermsArgs& args, int64_t block, const float* sums, int64_t parts,
                        int64_t step) {
    const int64_t H = args.heads(), down = args.gram.stride[2], right = args.gram.stride[3];
    const BlockTokens to(args.v, block, args.gram.stride[0], args.gram.stride[1]);
    float lanes[I];
    const auto add = [&]() {
        std::memcpy(lanes, sums, sizeof lanes);
        for (int64_t part = 1; part < parts; ++part)
            for (int64_t l = 0; l < I; ++l) lanes[l] += sums[part * step + l];
        sums += I;
    };
    float* const gram = static_cast<float*>(args.gram.data);
    for (int64_t g = 0; g < H; ++g)
        for (int64_t h = g; h < H; ++h) {
            add();
            for (int64_t l = 0; l < to.count; ++l)
                gram[to.start[l] + g * down + h * right] = gram[to.start[l] + h * down + g * right] =
                    lanes[l];
        }
    if (!args.x) return;
    const BlockTokens own(args.v, block, args.cross.stride[0], args.cross.stride[1]);
    for (int64_t h = 0; h < H; ++h) {
        add();
        for (int64_t l = 0; l < own.count; ++l)
            static_cast<float*>(args.cross.data)[own.start[l] + h * args.cross.stride[2]] = lanes[l];
    }
}

void norm_terms(const View& v, const View& weight, const View& x, const View& gammas, const View& gram,
                const View& cross, const View& residual, int threads) {
    const TermsArgs args{v, weight, x, gammas, gram, cross, residual};
    const int64_t width = args.width(), rows = args.rows(), blocks = args.blocks(), tiles = rows / FEATURES,
                  pairs = args.pairs() * I;
    // The order of the sums must not depend on the number of threads.
    const int64_t wanted = blocks < ENOUGH ? ENOUGH / blocks : 1, parts = wanted < tiles ? wanted : tiles;
    const int64_t chunks = args.stages() ? (args.features() + CHUNK - 1) / CHUNK : 0,
                  tile = aligned(std::max(args.heads() * FEATURES * I, width)),
                  row = args.heads() * args.row_units();
    threads = args.tokens() * width * args.features() < SERIAL ? 1 : threads;
    const int64_t packing = blocks * args.block_size(), mapping = aligned(rows * row),
                  means = aligned(2 * width);
    const int64_t summing = aligned(chunks * 2 * width), runs = parts > 1 ? blocks * parts : threads;
    const Memory memory(4 * (packing + mapping + means + summing + runs * pairs + threads * tile));
    float* const packed = memory.as<float>();
    float* const mapped = packed + packing;
    float* const mean = mapped + mapping;
    float* const sums = mean + means;
    float* const totals = sums + summing;
    float* const scratch = totals + runs * pairs;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        [[maybe_unused]] const TileRegisters registers;
#pragma omp for schedule(static)
        for (int64_t chunk = 0; chunk < chunks; ++chunk)
            sum_rows(args, chunk * CHUNK, sums + chunk * 2 * width);
#pragma omp single
        if (chunks) column_means(args, sums, chunks, mean);
#pragma omp for schedule(static) nowait
        for (int64_t e = 0; e < rows; ++e)
            pack_row(args, e, mean, scratch + thread() * tile, mapped + e * row);
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; ++block)
            pack_block(args, block, packed + block * args.block_size());
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < blocks * parts; ++item) {
            const int64_t block = item / parts, part = item % parts, rest = args.tokens() - block * I;
            const auto terms = rest > (V - 1) * W            ? block_terms<V>
                               : V > 2 && rest > (V - 2) * W ? block_terms<V - 1>
                               : V > 2 && rest > W           ? block_terms<2>
                                                             : block_terms<1>;
            float* const out = totals + (parts > 1 ? item : thread()) * pairs;
            const int64_t first = part * tiles / parts * FEATURES,
                          last = (part + 1) * tiles / parts * FEATURES;
            terms(args, packed + block * args.block_size(), mapped, first, last, scratch + thread() * tile,
                  out);
            if (parts == 1) write_terms(args, block, out, 1, pairs);
        }
        if (parts > 1) {
#pragma omp for schedule(static)
            for (int64_t block = 0; block < blocks; ++block)
                write_terms(args, block, totals + block * parts * pairs, parts, pairs);
        }
    }
}

}  // namespace PYGLOBENC_ISA
}  // namespace pyglobenc
