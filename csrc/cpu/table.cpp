// The table of one instruction set's functions, and whether this machine supports it.
#include "ops.h"

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define TEXT_(a) #a
#define TEXT(a) TEXT_(a)

namespace pyglobenc {
namespace PYGLOBENC_ISA {

static bool supported() {
#if defined(__AVX512BF16__)
    if (!__builtin_cpu_supports("avx512bf16")) return false;
#endif
#if defined(__AVX512F__)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#elif defined(__AVX2__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return true;
#endif
}

}  // namespace PYGLOBENC_ISA

namespace isa = PYGLOBENC_ISA;

const Kernels JOIN(kernels_, PYGLOBENC_ISA) = {
    TEXT(PYGLOBENC_ISA),  isa::supported,      isa::pair_norms,      isa::rollout_step,
    isa::head_gram,       isa::norm_terms,     isa::clone_relevance, isa::add_relevance,
    isa::linear_quotient, isa::linear_product, isa::relevance_attention, isa::relevance_tile,
    isa::proximity, isa::exp,
};

}  // namespace pyglobenc
