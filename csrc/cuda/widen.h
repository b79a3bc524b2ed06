// Loads consecutive aligned numbers. Half precision is converted to float32.
#pragma once

#include "../common/simt.h"

namespace pyglobenc {
namespace {

template <class V>
DEVICE Float2 load_two(const V* from) {
    if constexpr (sizeof(V) == 4)
        return *reinterpret_cast<const Float2*>(from);
    else
        return unpack<V>(*reinterpret_cast<const uint32_t*>(from));
}

// Returns four numbers as the bits of floats.
template <class V>
DEVICE Bytes16 load_four(const V* from) {
    if constexpr (sizeof(V) == 4) {
        return *reinterpret_cast<const Bytes16*>(from);
    } else {
        const Float2 both = *reinterpret_cast<const Float2*>(from), low = unpack<V>(bits(both.x)),
                     high = unpack<V>(bits(both.y));
        return Bytes16{{bits(low.x), bits(low.y), bits(high.x), bits(high.y)}};
    }
}

}  // namespace
}  // namespace pyglobenc
