// Loads consecutive aligned numbers: float32, or half precision converted to float32.
#pragma once

#include "../common/simt.h"

namespace pyglobenc {
namespace {

template <class V>
DEVICE Twin load_two(const V* from) {
    if constexpr (sizeof(V) == 4)
        return *reinterpret_cast<const Twin*>(from);
    else
        return unpack<V>(*reinterpret_cast<const uint32_t*>(from));
}

// Returns them as the bits of floats.
template <class V>
DEVICE Piece load_four(const V* from) {
    if constexpr (sizeof(V) == 4) {
        return *reinterpret_cast<const Piece*>(from);
    } else {
        const Twin both = *reinterpret_cast<const Twin*>(from), low = unpack<V>(bits(both.x)),
                   high = unpack<V>(bits(both.y));
        return Piece{{bits(low.x), bits(low.y), bits(high.x), bits(high.y)}};
    }
}

}  // namespace
}  // namespace pyglobenc
