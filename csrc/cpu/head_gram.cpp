// head_gram: computes, for each token j,
//
//   G[j][g, h] = v[g, j] K[g, h] v[h, j]^T, for g <= h and mirrored
//   c[j][h]    = v[h, j] P[h] x[j]^T
//
// J entries of K v or P x are kept in registers for V vectors of tokens. They are multiplied by v and summed
// without being stored. G takes n*d^2/2 multiply-adds, and c takes n*d^2. The packed values and x take n*d
// floats each.
#include "ops.h"
#include "parallel.h"
#include "products.h"

namespace pyglobenc {
namespace PYGLOBENC_ISA {

// The largest number of bytes of packed tokens that are multiplied by one K[g, h] before the next one.
constexpr int64_t SHARED = 4 << 20;

struct GramArgs {
    const View& v;             // [B, Hkv, n, dh]
    const View& kernel;        // [H, dh, H, dh]
    const View& x;             // [B, n, d] or none
    const View& cross_kernel;  // [H, dh, d] or none
    const View& gram;          // [B, n, H, H]
    const View& cross;         // [B, n, H] or none

    int64_t heads() const { return kernel.shape[0]; }
    int64_t dh() const { return v.shape[3]; }
    int64_t width() const { return x ? x.shape[2] : 0; }
    int64_t tokens() const { return v.shape[0] * v.shape[2]; }
    int64_t block_size() const { return (v.shape[1] * dh() + width()) * I; }
    // Returns the offset of a head's values in a packed block.
    int64_t value(int64_t h) const { return h / (heads() / v.shape[1]) * dh() * I; }
};

// Packs a block of tokens to out: the values [Hkv, dh, I], then x [d, I].
static void pack_block(const GramArgs& args, int64_t block, float* out) {
    pack_values(args.v, Unit::single, block, out);
    if (!args.x) return;
    out += args.v.shape[1] * args.dh() * I;
    const BlockTokens inputs(args.v, block, args.x.stride[0], args.x.stride[1]);
    pack_tokens(args.x, Unit::single, inputs.start, inputs.count, args.x.stride[2], args.width(), out);
}

// Adds the sum of (rows left) * right over C rows to total.
template <int C>
__attribute__((noinline)) static void add_rows(const float* left,  // [width, I]
                                               const float* rows,  // [C, width]
                                               int64_t step, int64_t width,
                                               const float* right,  // [C, I]
                                               Floats total[V]) {
    Floats acc[C][V];
    products<C, V, Unit::single>(left, rows, step, width, acc);
    // The sum within the tile comes first, because this rounds the large total less often.
    Floats part[V] = {};
    UNROLL for (int j = 0; j < C; ++j) UNROLL for (int v = 0; v < V; ++v) part[v] +=
        acc[j][v] * load(right + j * I + v * W);
    UNROLL for (int v = 0; v < V; ++v) total[v] += part[v];
}

// Writes the bilinear form right^T (matrix left) of each token to out [I]. The last rows are taken in pairs.
static void bilinear(const float* left,    // [width, I]
                     const float* matrix,  // [count, width]
                     int64_t step, int64_t width,
                     const float* right,  // [count, I]
                     int64_t count, float* out) {
    Floats total[V] = {};
    for (; count >= J; count -= J, matrix += J * step, right += J * I) {
        // Between two calls, the forward pass of a layer has displaced the weights from the caches.
        for (int64_t j = J; j < 2 * J && j < count; ++j)
            for (int64_t c = 0; c < width; c += 16) __builtin_prefetch(matrix + j * step + c);
        add_rows<J>(left, matrix, step, width, right, total);
    }
    for (; count >= 2; count -= 2, matrix += 2 * step, right += 2 * I)
        add_rows<2>(left, matrix, step, width, right, total);
    if (count) add_rows<1>(left, matrix, step, width, right, total);
    std::memcpy(out, total, sizeof total);
}

// Computes row g of the upper triangle of G, and c of head g, for the packed blocks [first, last).
static void gram_row(const GramArgs& args, const float* packed, int64_t first, int64_t last, int64_t g) {
    const int64_t H = args.heads(), dh = args.dh(), width = args.width(), down = args.gram.stride[2],
                  right = args.gram.stride[3];
    float* const gram = static_cast<float*>(args.gram.data);
    const float* const kernel = static_cast<const float*>(args.kernel.data);
    float lanes[I];
    for (int64_t h = g; h < H; ++h)
        for (int64_t block = first; block < last; ++block) {
            const float* const values = packed + block * args.block_size();
            const float* const matrix = kernel + at(args.kernel, g, 0, h);
            bilinear(values + args.value(h), matrix, args.kernel.stride[1], dh, values + args.value(g), dh,
                     lanes);
            const BlockTokens to(args.v, block, args.gram.stride[0], args.gram.stride[1]);
            for (int64_t l = 0; l < to.count; ++l)
                gram[to.start[l] + g * down + h * right] = gram[to.start[l] + h * down + g * right] =
                    lanes[l];
        }
    if (!args.x) return;
    const float* const matrix = static_cast<const float*>(args.cross_kernel.data) + at(args.cross_kernel, g);
    for (int64_t block = first; block < last; ++block) {
        const float* const values = packed + block * args.block_size();
        bilinear(values + args.v.shape[1] * dh * I, matrix, args.cross_kernel.stride[1], width,
                 values + args.value(g), dh, lanes);
        const BlockTokens to(args.v, block, args.cross.stride[0], args.cross.stride[1]);
        for (int64_t l = 0; l < to.count; ++l)
            static_cast<float*>(args.cross.data)[to.start[l] + g * args.cross.stride[2]] = lanes[l];
    }
}

void head_gram(const View& v, const View& kernel, const View& x, const View& cross_kernel, const View& gram,
               const View& cross, int threads) {
    const GramArgs args{v, kernel, x, cross_kernel, gram, cross};
    const int64_t H = args.heads(), width = H * args.dh(), blocks = (args.tokens() + I - 1) / I;
    // With one group of blocks, the H rows of the triangle are the tasks. They suffice for H / 4 threads.
    const int64_t share = blocks * H / (4 * threads) + 1, fits = SHARED / 4 / args.block_size() + 1,
                  most = share < fits ? share : fits;
    const int64_t groups = (blocks + most - 1) / most;
    threads = args.tokens() * width * (width + args.width()) < SERIAL ? 1 : threads;
    const Memory memory(4 * blocks * args.block_size());
    float* const packed = memory.as<float>();
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; ++block)
            pack_block(args, block, packed + block * args.block_size());
        // The longest rows of the triangle come first.
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < H * groups; ++item) {
            const int64_t first = item % groups * most, last = blocks < first + most ? blocks : first + most;
            gram_row(args, packed, first, last, item / groups);
        }
    }
}

}  // namespace PYGLOBENC_ISA
}  // namespace pyglobenc
