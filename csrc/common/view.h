// A tensor as the host code of the kernels sees it. This file has no intrinsics and no templates, because
// code for every machine includes it.
#pragma once

#include <cstdint>

namespace pyglobenc {

enum class Type : int { f32, f16, bf16, f64, i64, u8, i32 };

// A tensor of up to four axes, with strides in elements. data is null for an argument that is left out.
struct View {
    void* data = nullptr;
    Type type = Type::f32;
    int64_t shape[4] = {0, 0, 0, 0};
    int64_t stride[4] = {0, 0, 0, 0};

    explicit operator bool() const { return data != nullptr; }
};

}  // namespace pyglobenc
