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
// never has more than H * FEATURES entries of f. In total this takes n*d^2 + n*d*H^2/2 multiply-adds. The
// rows of W M are computed once for each call. They take d^2 floats, half as much again on tiles, and the
// packed values and inputs take n*d floats each.
//
// On tiles the n*d^2 are products of bf16 parts. An entry of W M has three, but one of W has a single part in
// a bfloat16 model, and two in a float16 model. There the values are multiplied with W, and M is applied to
// the features. C subtracts their mean over all features, which is the product of v with the mean row of W.
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
    int64_t max_row_units() const { return units(TILES ? Unit::three_parts : Unit::single, dh()); }
    int64_t features() const { return weight.shape[2]; }
    // The last tile is filled up with rows of zeros.
    int64_t rows() const { return (features() + FEATURES - 1) / FEATURES * FEATURES; }
    int64_t tokens() const { return v.shape[0] * v.shape[2]; }
    int64_t blocks() const { return (tokens() + I - 1) / I; }
    // Return the offsets in a packed block of a head's values, of their products with the means, and of x M.
    int64_t values(int64_t h) const { return h / (heads() / v.shape[1]) * value_units() * I; }
    int64_t means(int64_t h) const { return (v.shape[1] * value_units() + 2 * h) * I; }
    int64_t inputs() const { return TILES ? means(heads()) : means(0); }
    int64_t block_size() const { return inputs() + (x ? rows() : 0) * I; }
    int64_t pairs() const { return heads() * (heads() + 1) / 2 + (x ? heads() : 0); }
    int64_t stages() const { return gammas ? gammas.shape[0] : 0; }
    const float* gamma(int64_t stage) const {
        return static_cast<const float*>(gammas.data) + stage * features();
    }
    const float* row(int64_t e) const {
        return static_cast<const float*>(weight.data) + e * weight.stride[2];
    }
};

// The rows that the values are multiplied with, [rows, H, units]: those of W M, or those of W.
struct Rows {
    Unit unit;
    bool mapped;
    float* data;
};

// Writes the sums over CHUNK rows of D = W - the first row of W, of D times the first gamma, and of D^2, to
// out [3, width]. With D, a large mean does not take the digits. Returns the number of bf16 parts of these
// rows of W.
static int sum_rows(const TermsArgs& args, int64_t first, float* out) {
    const int64_t width = args.width(),
                  last = first + CHUNK < args.features() ? first + CHUNK : args.features();
    Ints used = {};
    // The sums of some columns stay in registers.
    const auto add = [&](int64_t c, int64_t count) __attribute__((always_inline)) {
        Floats sums[3][V] = {}, pivot[V] = {};
        std::memcpy(pivot, args.row(0) + c, sizeof(float) * count);
        for (int64_t e = first; e < last; ++e) {
            const float gamma = args.stages() ? args.gamma(0)[e] : 1;
            Floats row[V] = {};
            std::memcpy(row, args.row(e) + c, sizeof(float) * count);
            UNROLL for (int v = 0; v < V; ++v) {
                const Floats difference = row[v] - pivot[v];
                sums[0][v] += difference;
                sums[1][v] += difference * splat(gamma);
                if (TILES) sums[2][v] += difference * difference, used |= reinterpret_cast<Ints>(row[v]);
            }
        }
        for (int s = 0; s < 3; ++s) std::memcpy(out + s * width + c, sums[s], sizeof(float) * count);
    };
    int64_t c = 0;
    for (; c + I <= width; c += I) add(c, I);
    if (c < width) add(c, width - c);
    int32_t bits = 0;
    for (int l = 0; l < W; ++l) bits |= used[l];
    // bfloat16 and float16 have 16 and 13 bits less than float32.
    return bits & 0x1fff ? 3 : bits & 0xffff ? 2 : 1;
}

// Writes the mean of W over all rows to out[0], and that of (W - mean) * gamma to out[1]. sums, [chunks, 3,
// width], come from sum_rows. Returns whether the square of every column's mean is at most its variance, so
// that the mean can be subtracted after the product without a loss of digits.
static bool column_means(const TermsArgs& args, const float* sums, int64_t chunks, float* out) {
    const int64_t width = args.width(), d = args.features();
    std::memset(out, 0, sizeof(float) * 3 * width);
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
        for (int64_t c = 0; c < 3 * width; ++c) out[c] += sums[chunk * 3 * width + c];
    double gamma = 0;
    for (int64_t e = 0; args.stages() && e < d; ++e) gamma += args.gamma(0)[e];
    const float mean = float(gamma / d);
    bool vary = true;
    for (int64_t c = 0; c < width; ++c) {
        const float shift = out[c] / d, variance = out[2 * width + c] / d - shift * shift;
        out[width + c] = out[width + c] / d - shift * mean;
        out[c] = args.row(0)[c] + shift;
        vary = vary && out[c] * out[c] <= variance;
    }
    return vary;
}

// Writes row e of W M to out [width]. means, [2, width], come from column_means.
static void map_row(const TermsArgs& args, int64_t e, const float* means, float* out) {
    const int64_t width = args.width(), stages = args.stages();
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

// Writes row e as the products read it, to rows. scratch has [width].
static void pack_row(const TermsArgs& args, int64_t e, const float* means, const Rows& rows, float* scratch) {
    const int64_t units_of_head = units(rows.unit, args.dh());
    float* const out = rows.data + e * args.heads() * units_of_head;
    if (e >= args.features()) {
        std::memset(out, 0, sizeof(float) * args.heads() * units_of_head);
        return;
    }
    if constexpr (!TILES) return map_row(args, e, means, out);
    View numbers;
    numbers.data = const_cast<float*>(args.row(e));
    if (rows.mapped) {
        map_row(args, e, means, scratch);
        numbers.data = scratch;
    }
    for (int64_t h = 0; h < args.heads(); ++h)
        take_row(numbers, rows.unit, h * args.dh(), 1, args.dh(), out + h * units_of_head);
}

// Writes the sums over all features e of number(e, v), for each vector v of tokens, to out [V].
template <class Number>
static inline void sum_features(int64_t d, Floats* out, const Number& number) {
    for (int v = 0; v < V; ++v) out[v] = Floats{};
    for (int64_t first = 0; first < d; first += CHUNK) {
        Floats part[V] = {};
        for (int64_t e = first; e < first + CHUNK && e < d; ++e)
            UNROLL for (int v = 0; v < V; ++v) part[v] += number(e, v);
        for (int v = 0; v < V; ++v) out[v] += part[v];
    }
}

// Multiplies the x [d, I] of each token by M, and returns the squared norms in squares [V].
static void map_inputs(const TermsArgs& args, float* x, Floats* squares) {
    const int64_t d = args.features(), stages = args.stages();
    const auto at = [=](int64_t e, int v) { return x + e * I + v * W; };
    Floats sums[V];
    if (stages)
        sum_features(d, sums, [&](int64_t e, int v) { return load(at(e, v)); });
    else
        sum_features(d, squares, [&](int64_t e, int v) { return load(at(e, v)) * load(at(e, v)); });
    for (int64_t stage = 0; stage < stages; ++stage) {
        const float* const gamma = args.gamma(stage);
        Floats mean[V];
        for (int v = 0; v < V; ++v) mean[v] = sums[v] * splat(1.0f / d);
        const auto map = [&](int64_t e, int v) {
            const Floats mapped = (load(at(e, v)) - mean[v]) * splat(gamma[e]);
            store(at(e, v), mapped);
            return mapped;
        };
        if (stage + 1 < stages)
            sum_features(d, sums, map);
        else
            sum_features(d, squares, [&](int64_t e, int v) {
                const Floats mapped = map(e, v);
                return mapped * mapped;
            });
    }
}

// Multiplies one head's values with both rows of means, [2, width] from the head's first column on, to out
// [2, I].
[[maybe_unused]] static void multiply_means(const float* values, Unit unit, const float* means, int64_t width,
                                            int64_t dh, float* out) {
    const int64_t columns = tile_width(dh);
    Floats sums[2][V] = {};
    for (int64_t c = 0; c < dh; ++c)
        for (int v = 0; v < V; ++v) {
            Floats value = {};
            for (int p = 0; p < parts(unit); ++p) {
                const Ints words = reinterpret_cast<Ints>(load(values + (p * columns + c / 2) * I + v * W));
                value += reinterpret_cast<Floats>(c % 2 ? words & ~0xffff : words << 16);
            }
            for (int m = 0; m < 2; ++m) sums[m][v] += value * splat(means[m * width + c]);
        }
    std::memcpy(out, sums, sizeof sums);
}

// Packs a block of tokens to out: the values [Hkv, dh, I], on tiles their products with the means [H, 2, I],
// and x M [rows, I]. Also writes the squared norms of x M to args.residual.
static void pack_block(const TermsArgs& args, int64_t block, const float* means, const Rows& rows,
                       float* out) {
    const int64_t d = args.features();
    pack_values(args.v, args.unit(), block, out);
    for (int64_t h = 0; TILES && !rows.mapped && h < args.heads(); ++h)
        multiply_means(out + args.values(h), args.unit(), means + h * args.dh(), args.width(), args.dh(),
                       out + args.means(h));
    if (!args.x) return;
    out += args.inputs();
    const BlockTokens inputs(args.v, block, args.x.stride[0], args.x.stride[1]);
    pack_tokens(args.x, Unit::single, inputs.start, inputs.count, args.x.stride[2], d, out);
    std::memset(out + d * I, 0, sizeof(float) * (args.rows() - d) * I);
    Floats square[V];
    map_inputs(args, out, square);
    const BlockTokens to(args.v, block, args.residual.stride[0], args.residual.stride[1]);
    float lanes[I];
    std::memcpy(lanes, square, sizeof lanes);
    for (int64_t l = 0; l < to.count; ++l) static_cast<float*>(args.residual.data)[to.start[l]] = lanes[l];
}

// Writes one head's products with FEATURES rows, for VT vectors of tokens, to out [FEATURES, I].
template <int VT>
__attribute__((noinline)) static void transform(const float* values,  // [value_units, I]
                                                Unit unit,
                                                const float* rows,  // [FEATURES, row_units], `step` apart
                                                Unit row_unit, int64_t step, int64_t dh, float* out) {
#if TILES
    tile_products<VT>(values, parts(unit), rows, parts(row_unit), step, tile_width(dh), out, I);
#else
    (void)unit, (void)row_unit;
    Floats acc[J][VT];
    products<J, VT, Unit::single>(values, rows, step, dh, acc);
    UNROLL for (int j = 0; j < J; ++j) UNROLL for (int v = 0; v < VT; ++v)
        store(out + j * I + v * W, acc[j][v]);
#endif
}

// Applies M to the features e to e + FEATURES - 1 of v W. means, [2, I], come from multiply_means.
template <int VT>
[[maybe_unused]] static void map_features(const TermsArgs& args, int64_t e, const float* means, float* f) {
    const int64_t rest = args.features() - e, count = rest < FEATURES ? rest : FEATURES;
    Floats mean[2][VT];
    for (int m = 0; m < 2; ++m)
        for (int v = 0; v < VT; ++v) mean[m][v] = load(means + m * I + v * W);
    for (int64_t j = 0; j < count; ++j, f += I) {
        const Floats first = splat(args.gamma(0)[e + j]),
                     second = splat(args.stages() > 1 ? args.gamma(1)[e + j] : 1);
        for (int v = 0; v < VT; ++v) {
            Floats mapped = (load(f + v * W) - mean[0][v]) * first;
            if (args.stages() > 1) mapped = (mapped - mean[1][v]) * second;
            store(f + v * W, mapped);
        }
    }
    std::memset(f, 0, sizeof(float) * (FEATURES - count) * I);
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
static void block_terms(const TermsArgs& args, const float* packed, const Rows& rows, int64_t first,
                        int64_t last, float* f, float* out) {
    const int64_t H = args.heads(), dh = args.dh(), row = units(rows.unit, dh);
    const float* const x = packed + args.inputs();
    std::memset(out, 0, sizeof(float) * args.pairs() * I);
    for (int64_t e = first; e < last; e += FEATURES) {
        for (int64_t h = 0; h < H; ++h) {
            transform<VT>(packed + args.values(h), args.unit(), rows.data + (e * H + h) * row, rows.unit,
                          H * row, dh, f + h * FEATURES * I);
            if (TILES && !rows.mapped && args.stages())
                map_features<VT>(args, e, packed + args.means(h), f + h * FEATURES * I);
        }
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
    const int64_t chunks = TILES || args.stages() ? (args.features() + CHUNK - 1) / CHUNK : 0,
                  tile = aligned(std::max(args.heads() * FEATURES * I, width));
    threads = args.tokens() * width * args.features() < SERIAL ? 1 : threads;
    const int64_t packing = blocks * args.block_size(),
                  mapping = aligned(rows * args.heads() * args.max_row_units()), means = aligned(3 * width),
                  summing = aligned(chunks * 3 * width), runs = parts > 1 ? blocks * parts : threads;
    const Memory memory(4 * (packing + mapping + means + summing + runs * pairs + threads * tile));
    float* const packed = memory.as<float>();
    float* const mapped = packed + packing;
    float* const mean = mapped + mapping;
    float* const sums = mean + means;
    float* const totals = sums + summing;
    float* const scratch = totals + runs * pairs;
    Rows packed_rows{TILES ? Unit::three_parts : Unit::single, true, mapped};
    int row_parts = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        [[maybe_unused]] const TileRegisters registers;
#pragma omp for schedule(static) reduction(max : row_parts)
        for (int64_t chunk = 0; chunk < chunks; ++chunk)
            row_parts = std::max(row_parts, sum_rows(args, chunk * CHUNK, sums + chunk * 3 * width));
#pragma omp single
        if (chunks && column_means(args, sums, chunks, mean) && TILES && row_parts < 3)
            packed_rows = {row_parts == 1 ? Unit::one_part : Unit::two_parts, false, mapped};
#pragma omp for schedule(static) nowait
        for (int64_t e = 0; e < rows; ++e)
            pack_row(args, e, mean, packed_rows, scratch + thread() * tile);
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; ++block)
            pack_block(args, block, mean, packed_rows, packed + block * args.block_size());
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
            terms(args, packed + block * args.block_size(), packed_rows, first, last,
                  scratch + thread() * tile, out);
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
