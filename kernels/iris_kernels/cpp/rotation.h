// Rotary positions: channels i and i + half of a head are rotated together.
#pragma once

#include "columns.h"

namespace iris {

// Heads of (rows, heads, 2 half): where each starts, in elements.
template <class T>
struct Heads {
    T* first;
    int64_t count, row_stride, head_stride;
    T* at(int64_t row, int64_t head) const {
        return first + row * row_stride + head * head_stride;
    }
};

// A head by the angles of its row; `sign` is -1 to rotate backwards. `out` may not be `x`.
template <class T>
inline void rotate(const T* x, const float* cos, const float* sin, float sign, int64_t half, T* out) {
    for_columns<1>(half, [&](int64_t i, int, auto part) {
        const Vec a = load(x + i, part), b = load(x + half + i, part);
        const Vec c = load(cos + i, part), s = load(sin + i, part) * sign;
        store(out + i, a * c - b * s, part);
        store(out + half + i, b * c + a * s, part);
    });
}

}  // namespace iris
