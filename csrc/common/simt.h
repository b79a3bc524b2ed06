// The primitives that the kernels of csrc/cuda are written in. nvcc compiles each to an instruction or two. A
// host compiler runs the same source thread by thread (fibers.h), so that whole kernels can be tested without
// a GPU.
//
//   KERNEL(threads) name(...)     a kernel: a 1-D grid of 1-D blocks of whole warps, started by launch() of
//                                 csrc/cuda/launch.h; a second argument, blocks that a multiprocessor
//                                 is to hold at least
//   DEVICE                        before every function that kernels call, BOTH if the host does too; UNROLL
//                                 or ROLL before a loop
//   block()                       this block; thread(), threads(), warp() and lane(): this thread in it, how
//                                 many it has, and so on
//   shared()                      the block's dynamic shared memory, char*, aligned to 128 bytes, filled with
//                                 NaN when emulated
//   barrier(), warp_barrier()     all threads of the block, of the warp, arrive here; barrier(id, count) for
//                                 `count` threads, whole warps, of the block, id 1 to 15
//
// The next are met by all 32 lanes of a warp together:
//
//   shuffle(x, from)              x of the lane `from`, x any 4 bytes; shuffle_xor(x, mask) x of the lane
//                                 lane() ^ mask
//   any(flag)                     whether flag holds in one lane at least
//   mma<T>(c, a, b)               c += a b on tensor cores, T bf16, f16 (16x16 by 16x8) or tf32 (16x8 by
//                                 8x8); with g = lane() / 4 and t = lane() % 4,
//                                 c[0..3] are rows g, g, g + 8, g + 8 and columns 2t, 2t + 1, 2t, 2t + 1;
//                                 bf16, f16: a[0..3] pairs at rows g, g + 8, g, g + 8
//                                 and columns 2t, 2t, 2t + 8, 2t + 8,
//                                 b[0..1] pairs at rows 2t, 2t + 8 of column g; low half first
//                                 tf32: a[0..3] floats at rows g, g + 8, g, g + 8,
//                                 columns t, t, t + 4, t + 4, b[0..1] rows t, t + 4
//   load_matrices(r, row)         N = 1, 2 or 4 matrices of 8 rows of 16 bytes from shared memory (ldmatrix):
//                                 lane 8 m + i gives the address of row i of matrix m, and r[m] becomes
//                                 4 bytes at row g, bytes 4t to 4t + 3; lanes past 8 N are ignored
//   load_matrices_transposed      of 2-byte entries: r[m] becomes the pair at rows 2t, 2t + 1 of column g
//
// And by one thread alone:
//
//   copy_async<BYTES>(to, from, ok)   4, 8 or 16 bytes, aligned, from global to shared memory; zeros unless
//                                     ok, when nothing is read
//   commit_copies(), wait_copies<N>() ends a group of copies; waits for this thread's groups but the N
//                                     youngest: a barrier() then shows them to the others.
//                                     When emulated, bytes are NaN until their group was waited for.
//   load<V>(from)                     the Bytes16 or float at `from`, in global memory that the kernel
//                                     doesn't write
//   settled(p)                        p, for load(): the compiler adds to it and doesn't take the sum that it
//                                     is apart
//   bf16, f16, tf32                   bf16 and f16 hold bits; tf32 only names a type of mma, whose operands
//                                     are floats' bits
//   pack<T>(low, high)                two floats, rounded to bf16 or f16, in 4 bytes; unpack<T>(x) those two,
//                                     as a Float2
//   Bytes16                             16 bytes, aligned: one load or store; Float2 the same of two floats
//   bits(x), from_bits(u)             a float as uint32_t and back
//   round_tf32(x)                     to 11 significant bits; mma cuts off what a float has beyond them
//   exp2_approx, sqrt_approx          to 2 ulp; results below the normal numbers are 0
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)
#define DEVICE __device__ __forceinline__
#define BOTH __host__ __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define ROLL _Pragma("unroll 1")
#else
#define KERNEL(...) inline void
#define DEVICE inline
#define BOTH inline
#define UNROLL
#define ROLL
#endif

namespace pyglobenc {

struct bf16 {
    uint16_t bits;
};

struct f16 {
    uint16_t bits;
};

struct tf32 {};

struct alignas(16) Bytes16 {
    uint32_t word[4];
};

struct alignas(8) Float2 {
    float x, y;
};

}  // namespace pyglobenc

#if !defined(__CUDACC__)
#include "emulate.h"
#else

namespace pyglobenc {

DEVICE int block() { return int(blockIdx.x); }
DEVICE int thread() { return int(threadIdx.x); }
DEVICE int threads() { return int(blockDim.x); }
DEVICE int warp() { return int(threadIdx.x / 32); }
DEVICE int lane() { return int(threadIdx.x % 32); }

DEVICE char* shared() {
    extern __shared__ __align__(128) char memory[];
    return memory;
}

DEVICE void barrier() { __syncthreads(); }
DEVICE void barrier(int id, int count) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory"); }
DEVICE void warp_barrier() { __syncwarp(); }

template <class V>
DEVICE V shuffle(V x, int from) {
    return __shfl_sync(~0u, x, from);
}

template <class V>
DEVICE V shuffle_xor(V x, int mask) {
    return __shfl_xor_sync(~0u, x, mask);
}

DEVICE bool any(bool flag) { return __any_sync(~0u, flag); }

DEVICE uint32_t bits(float x) { return __float_as_uint(x); }
DEVICE float from_bits(uint32_t x) { return __uint_as_float(x); }

template <class V>
DEVICE V load(const char* from);
template <>
DEVICE float load<float>(const char* from) {
    float out;
    asm("ld.global.nc.f32 %0, [%1];" : "=f"(out) : "l"(from));
    return out;
}
template <>
DEVICE Bytes16 load<Bytes16>(const char* from) {
    Bytes16 out;
    asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(out.word[0]), "=r"(out.word[1]), "=r"(out.word[2]), "=r"(out.word[3])
        : "l"(from));
    return out;
}

DEVICE const char* settled(const char* p) {
    asm("" : "+l"(p));
    return p;
}

template <class T>
DEVICE uint32_t pack(float low, float high);
template <>
DEVICE uint32_t pack<bf16>(float low, float high) {
    uint32_t out;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
}
template <>
DEVICE uint32_t pack<f16>(float low, float high) {
    uint32_t out;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
}

template <class T>
DEVICE Float2 unpack(uint32_t x);
template <>
DEVICE Float2 unpack<bf16>(uint32_t x) {
    return {from_bits(x << 16), from_bits(x & 0xffff0000u)};
}
template <>
DEVICE Float2 unpack<f16>(uint32_t x) {
    Float2 out;
    asm("{.reg .f16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}"
        : "=f"(out.x), "=f"(out.y)
        : "r"(x));
    return out;
}

DEVICE float round_tf32(float x) { return from_bits((bits(x) + 0x1000u) & 0xffffe000u); }

DEVICE float exp2_approx(float x) {
    float out;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
    return out;
}

DEVICE float sqrt_approx(float x) {
    float out;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
    return out;
}

#define PYGLOBENC_MMA(T, SHAPE)                                                                          \
    template <>                                                                                          \
    DEVICE void mma<T>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {                  \
        asm("mma.sync.aligned." SHAPE " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                             \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                         \
    }

template <class T>
DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
PYGLOBENC_MMA(bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
PYGLOBENC_MMA(f16, "m16n8k16.row.col.f32.f16.f16.f32")
PYGLOBENC_MMA(tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef PYGLOBENC_MMA

DEVICE uint32_t shared_address(const void* at) { return uint32_t(__cvta_generic_to_shared(at)); }

#define PYGLOBENC_LOAD_MATRICES(NAME, KIND)                                                     \
    DEVICE void NAME(uint32_t (&r)[1], const void* row) {                                       \
        asm volatile("ldmatrix.sync.aligned.m8n8.x1" KIND ".shared.b16 {%0}, [%1];"             \
                     : "=r"(r[0])                                                               \
                     : "r"(shared_address(row))                                                 \
                     : "memory");                                                               \
    }                                                                                           \
    DEVICE void NAME(uint32_t (&r)[2], const void* row) {                                       \
        asm volatile("ldmatrix.sync.aligned.m8n8.x2" KIND ".shared.b16 {%0, %1}, [%2];"         \
                     : "=r"(r[0]), "=r"(r[1])                                                   \
                     : "r"(shared_address(row))                                                 \
                     : "memory");                                                               \
    }                                                                                           \
    DEVICE void NAME(uint32_t (&r)[4], const void* row) {                                       \
        asm volatile("ldmatrix.sync.aligned.m8n8.x4" KIND ".shared.b16 {%0, %1, %2, %3}, [%4];" \
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                           \
                     : "r"(shared_address(row))                                                 \
                     : "memory");                                                               \
    }
PYGLOBENC_LOAD_MATRICES(load_matrices, "")
PYGLOBENC_LOAD_MATRICES(load_matrices_transposed, ".trans")
#undef PYGLOBENC_LOAD_MATRICES

template <int BYTES>
DEVICE void copy_async(void* to, const void* from, bool ok) {
    const int read = ok ? BYTES : 0;
    if constexpr (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                     "r"(read)
                     : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from),
                     "n"(BYTES), "r"(read)
                     : "memory");
}

DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int N>
DEVICE void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

}  // namespace pyglobenc

#endif
