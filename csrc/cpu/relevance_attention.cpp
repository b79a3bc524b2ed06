// relevance_attention and relevance_rollout_step: computes the relevance of q, k and v and the rollout step
// in one walk over the pairs, with the formulas of pyglobenc/ops/relevance_attention.py.
//
// A task is one block of queries of one head, against all keys. Scores, <s, v> and <grad_o, v> of a tile of
// keys become alpha, U and the head's part of the map, and the products of alpha and U are added up while the
// tile is still in the first-level cache: 6 n^2 dh multiply-adds for a head, and no tile passes through
// memory. Each head's sums have one owner, and heads are added in order, so that results do not depend on the
// number of threads.
#include "division.h"
#include "ops.h"
#include "pack.h"

namespace pyglobenc {
namespace PYGLOBENC_ISA {

constexpr int64_t QUERIES = 64;                     // of a block; a multiple of I
constexpr int64_t TILE_KEYS = 48;                   // of a tile; a multiple of J
constexpr int64_t CHUNK_FLOATS = int64_t(1) << 22;  // that the sums and maps of a chunk of examples may take

static inline int64_t rounded(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

// Computes out[r, v] = sum_c left[c, v] * right(r, c), or adds the sum to out, for VT vectors and J rows. The
// function is not inlined, because the compiler keeps the sums in registers only in a separate function.
template <int VT, bool ADD>
__attribute__((noinline)) static void multiply(const float* left, int64_t left_step,  // [width, VT W]
                                               const float* right, int64_t row_step,  // [J, width]
                                               int64_t step, int64_t width, float* out,  // [J, VT W]
                                               int64_t out_step) {
    Floats acc[J][VT];
    UNROLL for (int r = 0; r < J; ++r) UNROLL for (int v = 0; v < VT; ++v) acc[r][v] = Floats{};
    for (int64_t c = 0; c < width; ++c, left += left_step, right += step) {
        Floats x[VT];
        UNROLL for (int v = 0; v < VT; ++v) x[v] = load(left + v * W);
        UNROLL for (int r = 0; r < J; ++r) {
            const Floats y = splat(right[r * row_step]);
            UNROLL for (int v = 0; v < VT; ++v) acc[r][v] += x[v] * y;
        }
    }
    UNROLL for (int r = 0; r < J; ++r) UNROLL for (int v = 0; v < VT; ++v) {
        float* const to = out + r * out_step + v * W;
        store(to, ADD ? load(to) + acc[r][v] : acc[r][v]);
    }
}

// The same for any number of vectors.
template <bool ADD>
static void multiply_all(int64_t vectors, const float* left, int64_t left_step, const float* right,
                         int64_t row_step, int64_t step, int64_t width, float* out, int64_t out_step) {
    for (int64_t v = 0; v < vectors;) {
        const int64_t rest = vectors - v, here = rest < V ? rest : V;
        const auto product = here == V       ? multiply<V, ADD>
                             : here == V - 1 ? multiply<V - 1, ADD>
                             : here == 2     ? multiply<2, ADD>
                                             : multiply<1, ADD>;
        product(left + v * W, left_step, right, row_step, step, width, out + v * W, out_step);
        v += here;
    }
}

// What all tasks read, and the sizes of their memory.
struct RelevanceWalk {
    const RelevanceArgs& args;
    int64_t H, n, dh;
    int64_t wide, targets, rows;  // dh and the rows of r in whole vectors, and n in whole register tiles

    explicit RelevanceWalk(const RelevanceArgs& given)
        : args(given), H(given.q.shape[1]), n(given.q.shape[2]), dh(given.q.shape[3]), wide(rounded(dh, W)),
          targets(given.r ? rounded(given.r.shape[1], W) : 0), rows(rounded(n, J)) {}

    // Floats of a head: the sums of R_k and R_v, and the block's map, transposed.
    int64_t sums() const { return args.r_q ? rows * wide : 0; }
    int64_t head() const { return aligned(2 * sums() + rows * QUERIES); }

    // Floats of an example's rollout step: its sums, transposed, and a block's weights.
    int64_t roll() const { return aligned((rows + QUERIES) * targets); }

    // Floats of a thread.
    int64_t scratch() const {
        return 3 * dh * QUERIES + 3 * (QUERIES + J) * wide + 2 * TILE_KEYS * wide +
               2 * (TILE_KEYS + 1) * QUERIES + J * QUERIES + QUERIES;
    }
};

// The positions of the real keys of an example, in order.
struct RealKeys {
    int32_t* position;  // [n]
    int64_t count;
};

static RealKeys real_keys(const RelevanceArgs& args, int64_t b, int32_t* position) {
    int64_t count = 0;
    for (int64_t j = 0; j < args.k.shape[2]; ++j)
        if (!args.key_mask || static_cast<const uint8_t*>(args.key_mask.data)[at(args.key_mask, b, j)])
            position[count++] = int32_t(j);
    return {position, count};
}

// One block of queries of one head.
struct RelevanceTask {
    const RelevanceWalk& walk;
    const RelevanceArgs& args;
    int64_t b, h, first, count;  // count: of the block's queries, from query `first` on
    const RealKeys& keys;
    float *sum_k, *sum_v, *map;  // of the head
    double* totals;              // [2] the sum of R_alpha, and what the add rule of the mask adds to it

    float *q, *s, *grad;     // [groups, dh, I] transposed
    float *q_rows, *s_rows;  // [QUERIES, wide]
    float* sum_q;            // [QUERIES + J, wide], with rows past the last query that nobody reads
    float *k, *v;            // [TILE_KEYS, wide]
    float *alpha, *u;        // [TILE_KEYS, QUERIES]
    float* gradient;         // [J, QUERIES]
    float* offset;           // [QUERIES] lse

    RelevanceTask(const RelevanceWalk& of, int64_t b_, int64_t h_, int64_t first_, const RealKeys& keys_,
                  float* head, double* totals_, float* scratch)
        : walk(of), args(of.args), b(b_), h(h_), first(first_),
          count(of.n - first_ < QUERIES ? of.n - first_ : QUERIES), keys(keys_), sum_k(head),
          sum_v(head + of.sums()), map(head + 2 * of.sums()), totals(totals_) {
        const auto next = [&scratch](int64_t floats) {
            float* const here = scratch;
            scratch += floats;
            return here;
        };
        for (float** transposed : {&q, &s, &grad}) *transposed = next(walk.dh * QUERIES);
        for (float** of_queries : {&q_rows, &s_rows, &sum_q}) *of_queries = next((QUERIES + J) * walk.wide);
        for (float** of_keys : {&k, &v}) *of_keys = next(TILE_KEYS * walk.wide);
        // The last group of J columns of a tile reads beyond its last row.
        for (float** tile : {&alpha, &u}) *tile = next((TILE_KEYS + 1) * QUERIES);
        gradient = next(J * QUERIES);
        offset = next(QUERIES);
    }

    // Copies vectors of tokens to rows of whole vectors.
    void take_rows(const View& from, const int32_t* position, int64_t start, int64_t tokens,
                   float* to) const {
        for (int64_t l = 0; l < tokens; ++l, to += walk.wide) {
            const int64_t token = position ? position[start + l] : start + l;
            take(from, Unit::single, at(from, b, h, token), from.stride[3], walk.dh, to);
            std::memset(to + walk.dh, 0, sizeof(float) * (walk.wide - walk.dh));
        }
    }

    void take_queries() const {
        take_rows(args.q, nullptr, first, count, q_rows);
        take_rows(args.s, nullptr, first, count, s_rows);
        const std::pair<const View*, float*> transposed[] = {
            {&args.q, q}, {&args.s, s}, {&args.grad_o, grad}};
        for (const auto& [from, to] : transposed)
            for (int64_t group = 0; *from && group * I < count; ++group) {
                int64_t start[I];
                const int64_t here = count - group * I < I ? count - group * I : I;
                for (int64_t l = 0; l < here; ++l) start[l] = at(*from, b, h, first + group * I + l);
                pack_tokens(*from, Unit::single, start, here, from->stride[3], walk.dh,
                            to + group * walk.dh * I);
            }
        // Lanes past the last query have probability 0.
        for (int64_t l = 0; l < QUERIES; ++l)
            offset[l] = l < count ? number(args.lse, b, h, first + l) : INFINITY;
        std::memset(sum_q, 0, sizeof(float) * (QUERIES + J) * walk.wide);
    }

    // Returns a mask of the lanes first + l, first + l + 1, ... that see a key.
    Ints seeing(int32_t key, int64_t l) const {
        Ints out;
        for (int64_t lane = 0; lane < W; ++lane) {
            const int64_t ahead = key - (first + l + lane);
            const bool right = args.right < 0 || ahead <= args.right;
            const bool left = args.left < 0 || ahead >= -args.left;
            out[lane] = right && left ? -1 : 0;
        }
        return out;
    }

    // Computes <queries, keys> of J keys, from queries [groups, dh, I] and keys [J, wide].
    void dots(const float* queries, const float* of_keys, float* out) const {
        for (int64_t l = 0; l < count; l += I) {
            const int64_t here = count - l < I ? count - l : I;
            multiply_all<false>((here + W - 1) / W, queries + l * walk.dh, I, of_keys, walk.wide, 1, walk.dh,
                                out + l, QUERIES);
        }
    }

    // Turns the dot products of one key into alpha, U and the map. total and added are sums over the pairs.
    void key_row(int32_t key, bool partly, float* alpha_row, float* u_row, const float* gradient_row,
                 float* map_row, Floats& total, Floats& added) const {
        for (int64_t l = 0; l < count; l += W) {
            const Floats dot = load(alpha_row + l);
            Floats probability = exp(dot * args.scaling - load(offset + l));
            if (partly) probability = seeing(key, l) ? probability : Floats{};
            const Floats relevance = load(u_row + l) * probability * 0.5f;
            store(map_row + l, positive_part(args.grad_o ? load(gradient_row + l) * relevance : relevance));
            if (!args.r_q) continue;
            Floats passed = relevance;
            if (args.additive_mask) {
                const Floats score = dot * args.scaling;
                const Floats quotient = safe_divide(relevance, score, 0);
                passed = quotient * score;
                total += relevance;
                // Away from 0 the score is safe(score) - GUARD, and a difference would be rounding alone.
                added += magnitude(score) > 1e-6f ? quotient * -GUARD : passed - relevance;
            }
            store(alpha_row + l, probability);
            store(u_row + l, safe_divide(passed, dot, args.stabilizer));
        }
    }

    // Computes one tile: alpha, U and the map, and their products.
    void tile(int64_t start) const {
        const int64_t real = keys.count - start < TILE_KEYS ? keys.count - start : TILE_KEYS;
        const int32_t* const key = keys.position + start;
        float* const of_map = map + start * QUERIES;
        const int64_t last = first + count - 1;
        if ((args.right >= 0 && key[0] - last > args.right) ||
            (args.left >= 0 && key[real - 1] - first < -args.left)) {
            std::memset(of_map, 0, sizeof(float) * real * QUERIES);
            return;
        }
        const bool partly = (args.right >= 0 && key[real - 1] - first > args.right) ||
                            (args.left >= 0 && key[0] - last < -args.left);
        const int64_t vectors = walk.wide / W, padded = rounded(real, J);
        take_rows(args.k, keys.position, start, real, k);
        take_rows(args.v, keys.position, start, real, v);
        std::memset(k + real * walk.wide, 0, sizeof(float) * (padded - real) * walk.wide);
        std::memset(v + real * walk.wide, 0, sizeof(float) * (padded - real) * walk.wide);
        for (int64_t j = 0; j < padded; j += J) {
            float* const alpha_rows = alpha + j * QUERIES;
            float* const u_rows = u + j * QUERIES;
            dots(q, k + j * walk.wide, alpha_rows);
            dots(s, v + j * walk.wide, u_rows);
            if (args.grad_o) dots(grad, v + j * walk.wide, gradient);
            Floats total = {}, added = {};
            for (int64_t r = 0; r < J && j + r < real; ++r)
                key_row(key[j + r], partly, alpha_rows + r * QUERIES, u_rows + r * QUERIES,
                        gradient + r * QUERIES, of_map + (j + r) * QUERIES, total, added);
            totals[0] += sum(total);
            totals[1] += sum(added);
        }
        if (!args.r_q) return;
        for (int64_t j = 0; j < padded; j += J) {
            float* const to = sum_k + (start + j) * walk.wide;
            multiply_all<true>(vectors, q_rows, walk.wide, u + j * QUERIES, QUERIES, 1, count, to, walk.wide);
            multiply_all<true>(vectors, s_rows, walk.wide, alpha + j * QUERIES, QUERIES, 1, count,
                               to + (sum_v - sum_k), walk.wide);
        }
        for (int64_t l = 0; l < count; l += J)
            multiply_all<true>(vectors, k, walk.wide, u + l, 1, QUERIES, real, sum_q + l * walk.wide,
                               walk.wide);
    }

    // Writes half of a tensor's vector times the sums of a token.
    void write(const View& out, const View& x, int64_t token, const float* sums) const {
        float* const to = static_cast<float*>(out.data) + at(out, b, h, token);
        const float* const from = static_cast<const float*>(x.data) + at(x, b, h, token);
        for (int64_t c = 0; c < walk.dh; ++c)
            to[c * out.stride[3]] = from[c * x.stride[3]] * sums[c] * 0.5f;
    }

    void run() const {
        take_queries();
        for (int64_t start = 0; start < keys.count; start += TILE_KEYS) tile(start);
        if (!args.r_q) return;
        for (int64_t l = 0; l < count; ++l) write(args.r_q, args.q, first + l, sum_q + l * walk.wide);
        if (first + count < walk.n) return;
        for (int64_t j = 0; j < keys.count; ++j) {
            write(args.r_k, args.k, keys.position[j], sum_k + j * walk.wide);
            write(args.r_v, args.v, keys.position[j], sum_v + j * walk.wide);
        }
    }
};

// Adds up the heads' maps of one block of queries, writes the row sums, and adds the block's part of the
// rollout step, without the identity, to rolled.
static void step(const RelevanceWalk& walk, int64_t b, int64_t first, const RealKeys& keys, float* heads,
                 float* rolled) {  // [rows, targets]
    const RelevanceArgs& args = walk.args;
    const int64_t count = walk.n - first < QUERIES ? walk.n - first : QUERIES, lanes = rounded(count, W);
    float* const whole = heads + 2 * walk.sums();
    double sums[QUERIES] = {};
    for (int64_t j = 0; j < keys.count; ++j) {
        for (int64_t l = 0; l < lanes; l += W) {
            float* const here = whole + j * QUERIES + l;
            Floats total = load(here);
            for (int64_t h = 1; h < walk.H; ++h) total += load(here + h * walk.head());
            store(here, total / float(walk.H));
        }
        for (int64_t l = 0; l < lanes; ++l) sums[l] += whole[j * QUERIES + l];
    }
    for (int64_t l = 0; l < count; ++l)
        static_cast<float*>(args.row_sums.data)[at(args.row_sums, b, first + l)] = float(sums[l]);
    if (!args.r) return;
    float* const weights = rolled + walk.rows * walk.targets;  // [QUERIES, targets]
    std::memset(weights, 0, sizeof(float) * QUERIES * walk.targets);
    for (int64_t t = 0; t < args.r.shape[1]; ++t)
        for (int64_t l = 0; l < count; ++l) {
            const float weight =
                number(args.r, b, t, first + l) / (args.normalize ? 1 + float(sums[l]) : 1.0f);
            weights[l * walk.targets + t] = weight;
            static_cast<float*>(args.r_out.data)[at(args.r_out, b, t, first + l)] = weight;
        }
    for (int64_t j = 0; j < keys.count; j += J)
        multiply_all<true>(walk.targets / W, weights, walk.targets, whole + j * QUERIES, QUERIES, 1, count,
                           rolled + j * walk.targets, walk.targets);
    if (first + count < walk.n) return;
    for (int64_t j = 0; j < keys.count; ++j)
        for (int64_t t = 0; t < args.r.shape[1]; ++t)
            static_cast<float*>(args.r_out.data)[at(args.r_out, b, t, keys.position[j])] +=
                rolled[j * walk.targets + t];
}

void relevance_attention(const RelevanceArgs& args, double* sums) {
    const RelevanceWalk walk(args);
    const int64_t batch = args.q.shape[0], H = walk.H, each = H * walk.head() + walk.roll();
    const int64_t most = CHUNK_FLOATS / each > 1 ? CHUNK_FLOATS / each : 1;
    const int64_t chunk = batch < most ? batch : most;
    const int threads = chunk * H * walk.n * walk.n * 6 * walk.dh < SERIAL ? 1 : args.threads;
    const Memory examples(4 * chunk * each), scratch(4 * threads * walk.scratch()), totals(16 * batch * H),
        positions(4 * chunk * walk.n), real(chunk * int64_t(sizeof(RealKeys)));
    std::memset(totals.start, 0, 16 * batch * H);
    for (int64_t start = 0; start < batch; start += chunk) {
        const int64_t count = batch - start < chunk ? batch - start : chunk;
        for (int64_t e = 0; e < count; ++e) {
            real.as<RealKeys>()[e] = real_keys(args, start + e, positions.as<int32_t>(4 * e * walk.n));
            float* const own = examples.as<float>(4 * e * each);
            for (int64_t h = 0; h < H; ++h)
                std::memset(own + h * walk.head(), 0, sizeof(float) * 2 * walk.sums());
            std::memset(own + H * walk.head(), 0, sizeof(float) * walk.roll());
        }
#pragma omp parallel num_threads(threads) if (threads > 1)
        for (int64_t first = 0; first < walk.n; first += QUERIES) {
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < count * H; ++task) {
                const int64_t e = task / H, h = task % H;
                RelevanceTask(walk, start + e, h, first, real.as<RealKeys>()[e],
                              examples.as<float>(4 * (e * each + h * walk.head())),
                              totals.as<double>(16 * (start * H + task)),
                              scratch.as<float>(4 * thread() * walk.scratch()))
                    .run();
            }
#pragma omp for schedule(dynamic)
            for (int64_t e = 0; e < count; ++e) {
                float* const own = examples.as<float>(4 * e * each);
                step(walk, start + e, first, real.as<RealKeys>()[e], own, own + H * walk.head());
            }
        }
    }
    for (int64_t task = 0; task < batch * H; ++task) {
        const double* const own = totals.as<double>(16 * task);
        sums[2 * (task / H)] += own[0];
        sums[2 * (task / H) + 1] += own[0] + own[1];
    }
}

}  // namespace PYGLOBENC_ISA
}  // namespace pyglobenc
