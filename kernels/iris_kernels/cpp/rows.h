// Vectors of one instruction set, elements of float and bfloat16, and loops over rows.
//
// Compiled without floating-point contraction: `exp2` must round as the Triton kernels do, so that
// the integer weights of `guided_sample` have the same bits on every backend.
//
// Shapes: R rows, V columns.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>

namespace iris {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float MIN_D = -1000.0f;  // exp(-1000) is 0 in fp32

struct bfloat16 {
    uint16_t bits;
};

// --- Elements -----------------------------------------------------------------------------------

inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) {
    uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
    return x;
}
template <>
inline bfloat16 from_float<bfloat16>(float x) {  // to the nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return bfloat16{0x7FC0};
    return bfloat16{static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)};
}

// `x` rounded to the precision of T.
template <class T>
inline float rounded(float x) {
    return to_float(from_float<T>(x));
}

// --- Vectors ------------------------------------------------------------------------------------

inline Vec all(float x) { return x - Vec{}; }

inline Vec load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline Vec load(const bfloat16* p) {
    Halves halves;
    std::memcpy(&halves, p, sizeof halves);
    return (Vec)(__builtin_convertvector(halves, Bits) << 16);
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
inline void store(bfloat16* p, Vec v) {
    Bits bits = (Bits)v;
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    bits = v == v ? bits : Bits{} + 0x7FC0;
    Halves halves = __builtin_convertvector(bits, Halves);
    std::memcpy(p, &halves, sizeof halves);
}

template <class T>
inline Vec rounded(Vec v);
template <>
inline Vec rounded<float>(Vec v) {
    return v;
}
template <>
inline Vec rounded<bfloat16>(Vec v) {
    Bits bits = (Bits)v;
    bits = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16;
    return v == v ? (Vec)bits : v;
}

// The larger; b if a is NaN.
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

inline float largest(Vec v) {
    float best = v[0];
    for (int i = 1; i < LANES; i++) best = v[i] > best ? v[i] : best;
    return best;
}

inline double sum(Vec v) {
    double total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
}

// --- The exponential ----------------------------------------------------------------------------

// 2^t by the polynomial of `_inverse_cdf`: separately rounded fp32 operations, relative error
// 1.9e-7. 0 if t is below -126 or NaN; t at most 127.
inline Vec exp2(Vec t) {
    constexpr float ROUND = 1.5f * (1 << 23);  // t + ROUND has no fraction bits
    constexpr int32_t EXPONENT = 127 - 0x4B400000;
    const Ints is_zero = ~(t >= -126.0f);
    t = larger(t, all(-126.0f));
    Vec shifted = t + ROUND;
    Vec f = t - (shifted - ROUND);
    Vec power = f * 0.001326472731307149f + 0.009671512991189957f;
    power = power * f + 0.05550733581185341f;
    power = power * f + 0.24022242426872253f;
    power = power * f + 0.6931470036506653f;
    power = power * f + 1.0f;
    return (Vec)((Ints)(power * (Vec)(((Ints)shifted + EXPONENT) << 23)) & ~is_zero);
}

// --- Rows ---------------------------------------------------------------------------------------

// Where the rows of a tensor (..., V) start, in elements: see `fold_rows`.
struct Rows {
    int64_t inner, outer_stride, inner_stride;
    int64_t start(int64_t row) const {
        return row / inner * outer_stride + row % inner * inner_stride;
    }
};

// Call `body(row)` for every row, in one parallel region if `threads` is more than 1.
template <class Body>
inline void for_rows(int64_t rows, int threads, Body body) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) body(row);
}

// Memory of this thread, kept for its next call.
struct Scratch {
    void* memory = nullptr;
    size_t size = 0;
    ~Scratch() { std::free(memory); }
    template <class T>
    T* get(size_t count) {
        if (count * sizeof(T) > size) {
            std::free(memory);
            size = (count * sizeof(T) + 63) / 64 * 64;
            memory = std::aligned_alloc(64, size);
            if (!memory) std::abort();
        }
        return static_cast<T*>(memory);
    }
};

}  // namespace iris
