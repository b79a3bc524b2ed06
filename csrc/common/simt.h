// The primitives that the kernels of csrc/cuda are written in. nvcc compiles each to an instruction or two. A
// host compiler runs the same source thread by thread (fibers.h), so that whole kernels can be tested without
// a GPU.
//
//   KERNEL(threads) name(...)   declares a kernel: a 1-D grid of 1-D blocks of whole warps, which launch() of
//                               csrc/cuda/launch.h starts. A second argument of KERNEL says how many blocks
//                               a multiprocessor should hold at least.
//   DEVICE, BOTH                DEVICE stands before every function that kernels call, BOTH if the host calls
//                               it too.
//   UNROLL, ROLL                stand before a loop that the compiler should, or should not, unroll.
//   block()                     returns the index of this block. thread(), warp() and lane() return this
//                               thread's place in the block, threads() the number of threads.
//   shared()                    returns the block's dynamic shared memory, a char* aligned to 128 bytes.
//                               Emulated memory is filled with NaN.
//   barrier(), warp_barrier()   wait for all threads of the block, or of the warp. barrier(id, count) waits
//                               for `count` threads, in whole warps; id is 1 to 15.
//
// All 32 lanes of a warp must call the following functions together. g is lane() / 4, and t is lane() % 4.
//
//   shuffle(x, from)            returns the x of the lane `from`; x is any 4 bytes.
//   shuffle_xor(x, mask)        returns the x of the lane lane() ^ mask.
//   any(flag)                   returns whether flag is true in at least one lane.
//   mma<T>(c, a, b)             adds a b to c on tensor cores. a is 16x16 and b is 16x8 for T = bf16 or f16;
//                               they are 16x8 and 8x8 for tf32. In all cases
//                               c[0..3] are at rows g, g, g + 8, g + 8 and columns 2t, 2t + 1, 2t, 2t + 1.
//                               bf16, f16: each entry is a pair of neighbours, the low half first;
//                               a[0..3] are at rows g, g + 8, g, g + 8 and columns 2t, 2t, 2t + 8, 2t + 8;
//                               b[0..1] are at rows 2t, 2t + 8 of column g.
//                               tf32: a[0..3] are floats at rows g, g + 8, g, g + 8 and columns t, t, t + 4,
//                               t + 4; b[0..1] are at rows t, t + 4 of column g.
//   load_matrices(r, row)       loads N = 1, 2 or 4 matrices, each of 8 rows of 16 bytes, from shared memory
//                               (ldmatrix). Lane 8 m + i gives the address of row i of matrix m. r[m] becomes
//                               bytes 4t to 4t + 3 of row g. Lanes past 8 N are ignored.
//   load_matrices_transposed    does the same for entries of 2 bytes, but r[m] becomes the pair at rows 2t,
//                               2t + 1 of column g.
//
// A single thread may call the following functions.
//
//   copy_async<BYTES>(to, from, ok)    starts copying 4, 8 or 16 aligned bytes from global to shared memory.
//                                      Unless ok, nothing is read and the copy consists of zeros.
//   commit_copies(), wait_copies<N>()  end a group of copies, and wait for all of this thread's groups but
//                                      the N youngest. A barrier() then shows the bytes to other threads.
//                                      Emulated bytes are NaN until their group has been waited for.
//   load<V>(from)                      returns the Bytes16 or float at `from`, in global memory that the
//                                      kernel does not write.
//   settled(p)                         returns p, for load(). It hides how p was computed, so that the
//                                      compiler adds offsets to p instead of computing each address anew.
//   bf16, f16, tf32                    name the number types. bf16 and f16 hold bits. tf32 only selects an
//                                      mma, whose operands are the bits of floats.
//   pack<T>(low, high), unpack<T>(x)   round two floats to bf16 or f16 in 4 bytes, and return them as Float2.
//   Bytes16, Float2                    are aligned, so that one instruction loads or stores them.
//   bits(x), from_bits(u)              convert a float to its bits in a uint32_t, and back.
//   positive_part(x)                   returns max(x, 0), but NaN for NaN and for -inf, because a sum that
//                                      overflowed may stand for any number.
//   round_tf32(x)                      rounds x to 11 significant bits; mma would cut the other bits off.
//   exp2_approx, sqrt_approx           are right to 2 ulp. Results below the normal numbers are 0.
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

namespace pyglobenc {

DEVICE float positive_part(float x) { return x - (x < 0 ? x : 0.0f); }

}  // namespace pyglobenc
