// Loops over the columns of a row, a vector at a time, the last one in part.
#pragma once

#include "rows.h"

namespace iris {

struct Whole {};  // LANES columns
struct Part {     // the first n of them
    int64_t n;
};

template <class T>
inline Vec load(const T* p, Whole) {
    return load(p);
}
template <class T>
inline Vec load(const T* p, Part part) {  // then zeros
    T padded[LANES] = {};
    std::memcpy(padded, p, part.n * sizeof(T));
    return load(padded);
}

// The vector, with `fill` behind the part.
inline Vec filled(Vec v, Whole, float) { return v; }
inline Vec filled(Vec v, Part part, float fill) {
    for (int64_t i = part.n; i < LANES; i++) v[i] = fill;
    return v;
}

template <class T>
inline void store(T* p, Vec v, Whole) {
    store(p, v);
}
template <class T>
inline void store(T* p, Vec v, Part part) {
    T padded[LANES];
    store(padded, v);
    std::memcpy(p, padded, part.n * sizeof(T));
}

// Call `body(i, k, part)` for the columns from i on, for all of the n columns; k, in [0, UNROLL),
// is known when the loop is unrolled, and numbers independent sums.
template <int UNROLL, class Body>
inline void for_columns(int64_t n, Body body) {
    int64_t i = 0;
    for (; i + UNROLL * LANES <= n; i += UNROLL * LANES)
        for (int k = 0; k < UNROLL; k++) body(i + k * LANES, k, Whole{});
    for (; i + LANES <= n; i += LANES) body(i, 0, Whole{});
    if (i < n) body(i, 0, Part{n - i});
}

constexpr int SUMS = 4;  // additions that do not wait for each other

// A sum over columns: fp32 in each of SUMS * LANES places, fp64 across them.
struct ColumnSum {
    Vec parts[SUMS] = {};
    void add(int k, Vec v) { parts[k] += v; }
    double total() const {
        double all = 0;
        for (int k = 0; k < SUMS; k++) all += sum(parts[k]);
        return all;
    }
};

// Without NaN; -INF if there is nothing else.
template <class T>
inline float row_maximum(const T* x, int64_t n) {
    Vec best[4] = {all(-INF), all(-INF), all(-INF), all(-INF)};
    for_columns<4>(n, [&](int64_t i, int k, auto part) {
        best[k] = larger(filled(load(x + i, part), part, -INF), best[k]);
    });
    return largest(larger(larger(best[0], best[1]), larger(best[2], best[3])));
}

inline float safe(float maximum) { return maximum == -INF ? 0.0f : maximum; }

}  // namespace iris
