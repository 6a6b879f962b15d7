// `silu_mul` on a CPU, forward and backward.

#include "columns.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

using namespace iris;

namespace {

constexpr int64_t BLOCK = 2048;  // columns that one thread takes at a time

// a b + c, rounded once if the instruction set can: here no other backend's bits are wanted.
inline Vec fused(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
    return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

// 1 / x for x in [1, 2].
inline Vec reciprocal(Vec x) {
#if defined(__AVX512F__)  // an estimate of 14 bits and a Newton step take less time than a division
    const Vec r = (Vec)_mm512_maskz_rcp14_ps(-1, (__m512)x);
    return fused(r, fused(-x, r, all(1.0f)), r);
#else
    return 1.0f / x;
#endif
}

// exp(x) for x <= 0, relative error 3e-7; 0 below -87.33 and of NaN.
inline Vec exp_of_negative(Vec x) {
    constexpr float ROUND = 1.5f * (1 << 23);  // x + ROUND has no fraction bits
    constexpr int32_t EXPONENT = 127 - 0x4B400000;
    constexpr float LOWEST = -87.33f;
    const Ints not_zero = x >= LOWEST;
    x = larger(x, all(LOWEST));
    const Vec shifted = fused(x, all(LOG2_E), all(ROUND));
    const Vec f = fused(x, all(LOG2_E), ROUND - shifted);
    Vec power = fused(f, all(0.001326472731307149f), all(0.009671512991189957f));
    power = fused(power, f, all(0.05550733581185341f));  // the polynomial of `exp2`
    power = fused(power, f, all(0.24022242426872253f));
    power = fused(power, f, all(0.6931470036506653f));
    power = fused(power, f, all(1.0f));
    return (Vec)((Ints)(power * (Vec)(((Ints)shifted + EXPONENT) << 23)) & not_zero);
}

// s(x) = 1 / (1 + exp(-x)), and 1 - s(x) = s(-x) without cancellation; numbers for NaN.
struct Sigmoid {
    Vec of_x, of_minus_x;
};

inline Sigmoid sigmoid(Vec x) {
    const Vec e = exp_of_negative((Vec)((Bits)x | 0x80000000));
    const Vec large = reciprocal(e + 1.0f), small = e * large;
    const Ints positive = x >= 0.0f;
    return {positive ? large : small, positive ? small : large};
}

// Rows of I columns in blocks: `body(row, first column, number of columns)`.
template <class Body>
void for_blocks(int64_t R, int64_t I, int threads, Body body) {
    const int64_t blocks = (I + BLOCK - 1) / BLOCK;
    for_rows(R * blocks, threads, [=](int64_t b) {
        const int64_t first = b % blocks * BLOCK;
        body(b / blocks, first, I - first < BLOCK ? I - first : BLOCK);
    });
}

template <class T>
void forward(const void* gates, const void* ups, int64_t stride, void* out, int64_t R, int64_t I,
             int threads) {
    for_blocks(R, I, threads, [=](int64_t row, int64_t first, int64_t n) {
        const T* gate = static_cast<const T*>(gates) + row * stride + first;
        const T* up = static_cast<const T*>(ups) + row * stride + first;
        T* product = static_cast<T*>(out) + row * I + first;
        for_columns<1>(n, [&](int64_t i, int, auto part) {
            const Vec x = load(gate + i, part);
            store(product + i, rounded<T>(x * sigmoid(x).of_x) * load(up + i, part), part);
        });
    });
}

template <class T>
void backward(const void* gates, const void* ups, const void* d_out, int64_t stride, void* d_gates,
              void* d_ups, int64_t R, int64_t I, int threads) {
    for_blocks(R, I, threads, [=](int64_t row, int64_t first, int64_t n) {
        const int64_t start = row * stride + first;
        const T *gate = static_cast<const T*>(gates) + start;
        const T *up = static_cast<const T*>(ups) + start;
        const T *upstream = static_cast<const T*>(d_out) + row * I + first;
        T *d_gate = static_cast<T*>(d_gates) + start, *d_up = static_cast<T*>(d_ups) + start;
        for_columns<1>(n, [&](int64_t i, int, auto part) {
            const Vec x = load(gate + i, part), u = load(upstream + i, part);
            const Sigmoid s = sigmoid(x);
            const Vec slope = s.of_x * (1.0f + x * s.of_minus_x);
            store(d_gate + i, u * load(up + i, part) * slope, part);
            store(d_up + i, u * rounded<T>(x * s.of_x), part);
        });
    });
}

}  // namespace

extern "C" {

// Rows of gates and of ups start `stride` elements apart, those of `out` I.
void iris_silu_mul(int is_bfloat16, const void* gates, const void* ups, int64_t stride, void* out,
                   int64_t R, int64_t I, int threads) {
    const auto run = is_bfloat16 ? forward<bfloat16> : forward<float>;
    run(gates, ups, stride, out, R, I, threads);
}

// So do those of their gradients.
void iris_silu_mul_backward(int is_bfloat16, const void* gates, const void* ups, const void* d_out,
                            int64_t stride, void* d_gates, void* d_ups, int64_t R, int64_t I,
                            int threads) {
    const auto run = is_bfloat16 ? backward<bfloat16> : backward<float>;
    run(gates, ups, d_out, stride, d_gates, d_ups, R, I, threads);
}
}
