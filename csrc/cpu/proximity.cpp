// proximity: computes, for each row t and key j,
//
//   out[t, j] = max(0, |y[t]|_1 - |y[t] - F|_1),   F = sum_h alpha[h, t, j] f[h, j]
//
// The difference of the norms is the sum of min(s, 2 |y| - s) over the features, with s = F where y >= 0 and
// -F elsewhere. So its rounding error depends on F and not on the larger y. J rows and V vectors of features
// are kept in registers, and F is never stored. The kernel takes T*n*d*H multiply-adds.
#include "division.h"
#include "ops.h"
#include "pack.h"

namespace pyglobenc {
namespace PYGLOBENC_ISA {

// A task has this many rows, whose y stay in the second-level cache, and this many keys.
constexpr int64_t TASK_ROWS = 10 * J, TASK_KEYS = 16;

struct ProximityArgs {
    const View& alpha;  // [B, H, T, n]
    const View& f;      // [B, H, n, d], features contiguous
    const View& y;      // [B, T, d], features contiguous
    const View& out;    // [B, T, n]
};

// Returns |y| - |y - F| of each feature.
static inline Floats nearer(Floats F, Floats y) {
    const Floats size = magnitude(y);
    const Ints sign = reinterpret_cast<Ints>(y) ^ reinterpret_cast<Ints>(size);
    const Floats s = reinterpret_cast<Floats>(reinterpret_cast<Ints>(F) ^ sign), other = 2 * size - s;
    return s < other ? s : other;
}

// Adds the sums over VT vectors of features to total. TAIL: VT is 1 and the vector has only `lanes` features.
template <int R, int VT, bool TAIL>
__attribute__((noinline)) static void add_features(const float* f,  // [H, features], rows `step` apart
                                                   int64_t step,
                                                   const float* alpha,  // [H, R]
                                                   int64_t H,
                                                   const float* y,  // [R, features], rows `down` apart
                                                   int64_t down, int64_t lanes, Floats total[R]) {
    const int64_t count = TAIL ? lanes : W;
    Floats acc[R][VT];
    UNROLL for (int r = 0; r < R; ++r) UNROLL for (int v = 0; v < VT; ++v) acc[r][v] = Floats{};
    for (int64_t h = 0; h < H; ++h, f += step, alpha += R) {
        Floats x[VT];
        UNROLL for (int v = 0; v < VT; ++v) x[v] = load_some(f + v * W, count);
        UNROLL for (int r = 0; r < R; ++r) UNROLL for (int v = 0; v < VT; ++v) acc[r][v] +=
            x[v] * splat(alpha[r]);
    }
    UNROLL for (int r = 0; r < R; ++r) {
        Floats part = {};
        UNROLL for (int v = 0; v < VT; ++v) part +=
            nearer(acc[r][v], load_some(y + r * down + v * W, count));
        total[r] += part;
    }
}

// Computes one key of R rows, or of fewer rows if there are fewer left; returns the number of rows.
template <int R>
static int64_t rows_of_key(const ProximityArgs& args, int64_t b, int64_t t, int64_t rest, int64_t j,
                           float* alpha) {
    if constexpr (R > 1)
        if (rest < R) return rows_of_key<R - 1>(args, b, t, rest, j, alpha);
    const int64_t H = args.f.shape[1], d = args.f.shape[3], step = args.f.stride[1], down = args.y.stride[1];
    bool seen = false;
    for (int64_t h = 0; h < H; ++h)
        for (int64_t r = 0; r < R; ++r) {
            alpha[h * R + r] = number(args.alpha, b, h, t + r, j);
            seen |= alpha[h * R + r] != 0;
        }
    Floats total[R] = {};
    const float* f = static_cast<const float*>(args.f.data) + at(args.f, b, 0, j);
    const float* y = static_cast<const float*>(args.y.data) + at(args.y, b, t);
    int64_t c = seen ? 0 : d;
    for (; c + V * W <= d; c += V * W)
        add_features<R, V, false>(f + c, step, alpha, H, y + c, down, W, total);
    for (; c + W <= d; c += W) add_features<R, 1, false>(f + c, step, alpha, H, y + c, down, W, total);
    if (c < d) add_features<R, 1, true>(f + c, step, alpha, H, y + c, down, d - c, total);
    for (int64_t r = 0; r < R; ++r) {
        const float value = sum(total[r]);
        static_cast<float*>(args.out.data)[at(args.out, b, t + r, j)] = value - (value < 0 ? value : 0);
    }
    return R;
}

void proximity(const View& alpha, const View& f, const View& y, const View& out, int threads) {
    const ProximityArgs args{alpha, f, y, out};
    const int64_t H = f.shape[1], T = y.shape[1], n = f.shape[2], d = f.shape[3];
    const int64_t blocks = (T + TASK_ROWS - 1) / TASK_ROWS, parts = (n + TASK_KEYS - 1) / TASK_KEYS;
    threads = f.shape[0] * T * n * d * H < SERIAL ? 1 : threads;
    const int64_t each = aligned(H * J);
    const Memory memory(4 * threads * each);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t task = 0; task < f.shape[0] * blocks * parts; ++task) {
        const int64_t first = task % parts * TASK_KEYS, start = task / parts % blocks * TASK_ROWS,
                      b = task / parts / blocks;
        const int64_t last = n < first + TASK_KEYS ? n : first + TASK_KEYS,
                      stop = T < start + TASK_ROWS ? T : start + TASK_ROWS;
        for (int64_t j = first; j < last; ++j)
            for (int64_t t = start; t < stop;)
                t += rows_of_key<J>(args, b, t, stop - t, j, memory.as<float>(4 * thread() * each));
    }
}

}  // namespace PYGLOBENC_ISA
}  // namespace pyglobenc
