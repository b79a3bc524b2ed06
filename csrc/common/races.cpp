// Defines the functions that code compiled with -fsanitize=thread calls, in place of the sanitizer's own
// runtime. races.h says what they serve.
#include <cstddef>

#include "fibers.h"

using pyglobenc::emulated::touch;

extern "C" {
#define PYGLOBENC_TOUCH(BYTES)                                     \
    void __tsan_read##BYTES(void* at) { touch(at, BYTES, false); } \
    void __tsan_write##BYTES(void* at) { touch(at, BYTES, true); }
PYGLOBENC_TOUCH(1)
PYGLOBENC_TOUCH(2)
PYGLOBENC_TOUCH(4)
PYGLOBENC_TOUCH(8)
PYGLOBENC_TOUCH(16)
void __tsan_read_range(void* at, size_t bytes) { touch(at, bytes, false); }
void __tsan_write_range(void* at, size_t bytes) { touch(at, bytes, true); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
