// Memory and threads of a kernel.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include "kernels.h"

namespace pyglobenc {
namespace PYGLOBENC_ISA {

constexpr int64_t SERIAL = int64_t(1) << 20;  // multiply-adds below which a second thread does not pay

struct Memory {
    void* start;
    explicit Memory(int64_t bytes) : start(allocate(bytes)) {}
    ~Memory() { release(start); }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    template <class T>
    T* as(int64_t offset = 0) const {
        return reinterpret_cast<T*>(static_cast<char*>(start) + offset);
    }
};

static inline int thread() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

}  // namespace PYGLOBENC_ISA
}  // namespace pyglobenc
