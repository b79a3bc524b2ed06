// linear_relevance: computes the two steps before and after the GEMMs of the Linear rule (Chefer et al.,
// 2021, eq. 5).
//
//   S = R / safe(Z), Z = (y - bias + |x| |W|^T) / 2
//   R_in = (x (S W) + |x| (S |W|)) / 2
//
// Each step takes one pass over memory, which reads three arrays and writes one. torch would make seven
// passes for the first step.
//
// Outputs whose Z is a tiny part of |x| |W|^T + |bias| have lost their digits, and S is set to 0 there. The
// warp that finds such an output computes Z = sum_e max(x_e w_e, 0) for it, and stores R / safe(Z) in place
// of |x| |W|^T. It also sets the flag of its strip. The second pass then adds R / safe(Z) max(x_e w_e, 0). So
// the host need not know of these outputs.
#include "division.h"
#include "launch.h"
#include "relevance.h"

namespace pyglobenc {

constexpr int LINEAR_THREADS = 256;

namespace {

// Calls body(from, e) in the whole warp for every lane `from` and every e whose set[e] is true there, one
// after the other.
template <class Body>
DEVICE void for_each_set(const bool (&set)[4], const Body& body) {
    ROLL for (int from = 0; from < 32; ++from) {
        UNROLL
        for (int e = 0; e < 4; ++e)
            if (shuffle(int(set[e]), from)) body(from, e);
    }
}

DEVICE float positive(float x) { return x > 0 ? x : 0.0f; }

// Returns sum_e max(x[e] w[e], 0) of an output, computed by the whole warp.
DEVICE float clamped_sum(const LinearArgs& args, int64_t row, int output) {
    const float* const x = args.x + row * args.d_in;
    const float* const w = args.weight + output * args.output_step;
    float sum = 0;
    for (int e = lane(); e < args.d_in; e += 32) sum += positive(x[e] * w[e * args.input_step]);
    return sum_over_warp(sum);
}

// Adds the relevance of a strip's nearly dead outputs to this lane's inputs x, from input `at` on.
DEVICE void add_dead(const LinearArgs& args, int64_t row, int strip, int at, const Float4& x, Float4& out) {
    const int first = strip * LINEAR_STRIP;
    const Float4 s = load_four(args.bound + row * args.d_out, first + 4 * lane(), args.d_out);
    bool dead[4];
    UNROLL
    for (int e = 0; e < 4; ++e) dead[e] = s.x[e] != 0;
    for_each_set(dead, [&](int from, int e) {
        const float alone = shuffle(s.x[e], from);
        const float* const w = args.weight + (first + 4 * from + e) * args.output_step;
        UNROLL
        for (int i = 0; i < 4; ++i)
            if (at + i < args.d_in) out.x[i] += alone * positive(x.x[i] * w[(at + i) * args.input_step]);
    });
}

}  // namespace

// In both passes, a block takes a token, and a warp one strip at a time.
KERNEL(LINEAR_THREADS, 4) linear_quotient_kernel(QuotientArgs args) {
    const int64_t row = block(), start = row * args.d_out;
    for (int strip = warp(); strip < args.strips; strip += LINEAR_THREADS / 32) {
        const int first = strip * LINEAR_STRIP, at = first + 4 * lane();
        const Float4 r = load_four(args.r + start, at, args.d_out),
                     output = load_four(args.output + start, at, args.d_out);
        const Float4 bound = load_four(args.bound + start, at, args.d_out);
        Float4 bias = {};
        if (args.bias) bias = load_four(args.bias, at, args.d_out);
        Float4 s, alone = {};
        bool dead[4];
        UNROLL
        for (int e = 0; e < 4; ++e) {
            const float z = (output.x[e] + bound.x[e] - bias.x[e]) * 0.5f;
            dead[e] = z < args.least * (bound.x[e] + magnitude(bias.x[e])) && r.x[e] != 0;
            s.x[e] = dead[e] ? 0.0f : safe_divide(r.x[e], z);
        }
        store_four(args.s + start, at, args.d_out, s);
        const bool some = any(dead[0] || dead[1] || dead[2] || dead[3]);
        if (lane() == 0) args.flags[row * args.strips + strip] = some;
        if (!some) continue;
        for_each_set(dead, [&](int from, int e) {
            const float z = clamped_sum(args, row, first + 4 * from + e);
            if (lane() == from) alone.x[e] = safe_divide(r.x[e], z);
        });
        store_four(args.bound + start, at, args.d_out, alone);
    }
}

void linear_quotient(const QuotientArgs& args, void* stream) {
    launch(linear_quotient_kernel, args.rows, LINEAR_THREADS, 0, stream, args);
}

KERNEL(LINEAR_THREADS, 4) linear_product_kernel(ProductArgs args) {
    const int64_t row = block(), start = row * args.d_in;
    for (int first = warp() * LINEAR_STRIP; first < args.d_in; first += LINEAR_THREADS / 32 * LINEAR_STRIP) {
        const int at = first + 4 * lane();
        const Float4 x = load_four(args.x + start, at, args.d_in),
                     plain = load_four(args.plain_s + start, at, args.d_in);
        Float4 out = load_four(args.out + start, at, args.d_in);
        UNROLL
        for (int e = 0; e < 4; ++e) out.x[e] = (x.x[e] * out.x[e] + magnitude(x.x[e]) * plain.x[e]) * 0.5f;
        for (int strip = 0; strip < args.strips; strip += 32) {
            const bool flag = strip + lane() < args.strips && args.flags[row * args.strips + strip + lane()];
            if (!any(flag)) continue;
            for (int from = 0; from < 32; ++from)
                if (shuffle(int(flag), from)) add_dead(args, row, strip + from, at, x, out);
        }
        store_four(args.out + start, at, args.d_in, out);
    }
}

void linear_product(const ProductArgs& args, void* stream) {
    launch(linear_product_kernel, args.rows, LINEAR_THREADS, 0, stream, args);
}

}  // namespace pyglobenc
