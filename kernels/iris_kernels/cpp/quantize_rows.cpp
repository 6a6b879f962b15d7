// `quantize_rows` on a CPU: the largest absolute value of a row, then its quotients.

#include "columns.h"

using namespace iris;

namespace {

constexpr float FP8_MAX = 448.0f;

typedef uint8_t Bytes __attribute__((vector_size(LANES)));

// float8_e4m3fn to the nearest, ties to even, NaN above 464: the bits of torch's conversion.
inline Bytes to_fp8(Vec v) {
    constexpr uint32_t NORMAL = 121u << 23;         // 2^-6, the smallest normal number
    constexpr uint32_t TOO_LARGE = 1087u << 20;     // 480
    constexpr uint32_t REBIASED = (7u - 127) << 23; // exponents
    const Vec denormal_unit = (Vec)(Bits{} + (141u << 23));  // its last place is that of denormals
    const Bits sign = (Bits)v & 0x80000000, magnitude = (Bits)v ^ sign;
    const Bits denormal = (Bits)((Vec)magnitude + denormal_unit) - (Bits)denormal_unit;
    const Bits normal = (magnitude + REBIASED + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20;
    Bits result = magnitude < NORMAL ? denormal : normal;
    result = magnitude >= TOO_LARGE ? Bits{} + 0x7F : result;
    return __builtin_convertvector((result & 0xFF) | (sign >> 24), Bytes);
}

inline void store(uint8_t* p, Bytes v, Whole) { std::memcpy(p, &v, sizeof v); }
inline void store(uint8_t* p, Bytes v, Part part) { std::memcpy(p, &v, part.n); }

// NaN if there is any: as integers, its bits are larger than those of the other absolute values.
template <class T>
float largest_magnitude(const T* x, int64_t n) {
    Ints best[SUMS] = {};
    for_columns<SUMS>(n, [&](int64_t i, int k, auto part) {
        const Ints magnitude = (Ints)load(x + i, part) & 0x7FFFFFFF;
        best[k] = magnitude > best[k] ? magnitude : best[k];
    });
    int32_t bits = 0;
    for (int k = 0; k < SUMS; k++)
        for (int lane = 0; lane < LANES; lane++) bits = best[k][lane] > bits ? best[k][lane] : bits;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

template <class T>
void run(const void* x, uint8_t* values, float* scales, int64_t R, int64_t D, int threads) {
    for_rows(R, threads, [=](int64_t r) {
        const T* row = static_cast<const T*>(x) + r * D;
        float scale = largest_magnitude(row, D) / FP8_MAX;
        if (scale == 0) scale = 1;
        scales[r] = scale;
        for_columns<1>(D, [&](int64_t i, int, auto part) {
            store(values + r * D + i, to_fp8(load(row + i, part) / scale), part);
        });
    });
}

}  // namespace

extern "C" {

void iris_quantize_rows(int is_bfloat16, const void* x, void* values, float* scales, int64_t R,
                        int64_t D, int threads) {
    const auto run = is_bfloat16 ? ::run<bfloat16> : ::run<float>;
    run(x, static_cast<uint8_t*>(values), scales, R, D, threads);
}
}
