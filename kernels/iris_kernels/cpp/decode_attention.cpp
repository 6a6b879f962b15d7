// `decode_attention` and `rope_append_attention` on a CPU, one key-value head of one sequence at a
// time: the new token into the cache; then per query head all scores, their maximum, exponentials
// and sum, and the weighted sum of the values. Everything in fp32.
//
// Shapes: as in decode_attention/op.py.

#include "rotation.h"

using namespace iris;

namespace {

// The last dimension of every tensor is contiguous; strides are in elements.
struct PerHead {  // (B, heads, Dh)
    void* first;
    int64_t row_stride, head_stride;
    template <class T>
    T* at(int64_t row, int64_t head) const {
        return static_cast<T*>(first) + row * row_stride + head * head_stride;
    }
};

struct Cache {  // (rows, Hkv, S, Dh)
    void* first;
    int64_t row_stride, head_stride, entry_stride;
    template <class T>
    T* at(int64_t row, int64_t head, int64_t entry = 0) const {
        return static_cast<T*>(first) + row * row_stride + head * head_stride + entry * entry_stride;
    }
};

struct Integers {
    const void* first;
    int64_t wide;  // int64, else int32
    int64_t operator[](int64_t i) const {
        return wide ? static_cast<const int64_t*>(first)[i] : static_cast<const int32_t*>(first)[i];
    }
};

// Packed by decode_attention/cpp_path.py: one argument, because ctypes converts each for itself.
struct Arguments {
    int64_t is_bfloat16, threads;
    int64_t B, H, Hkv, width, S, N, prefix_S, positions;
    PerHead query, context;
    Cache keys, values, prefix_keys, prefix_values;  // prefixes: nullptr for none
    Integers lengths, prefix_lengths, prefix_index;
    PerHead new_key, new_value;  // nullptr for none
    const float *cos, *sin;    // (positions, Dh / 2)
    int64_t table_stride;
    double scale;

    bool appends() const { return new_key.first != nullptr; }
    int64_t prefix_length(int64_t b) const {
        return prefix_keys.first && prefix_index[b] >= 0 ? prefix_lengths[b] : 0;
    }
};
static_assert(sizeof(Arguments) == 8 * 48, "as cpp_path.py packs it");

thread_local Scratch scratch;

// Adjacent lanes added, those of a before those of b.
inline Vec add_pairs(Vec a, Vec b) {
#if defined(__AVX512F__)
    const Ints even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
#elif defined(__AVX2__)
    const Ints even = {0, 2, 4, 6, 8, 10, 12, 14};
#else
    const Ints even = {0, 2, 4, 6};
#endif
    return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, even + 1);
}

// In the following W is Dh in whole vectors, which then stay in registers; 0 for any Dh.

template <class T, int W>
inline Vec products(const float* q, const T* key, int64_t width) {
    Vec total = {};
    for (int w = 0; w < W; w++) total += load(q + w * LANES) * load(key + w * LANES);
    if (W) return total;
    for_columns<1>(width, [&](int64_t i, int, auto part) {
        total += load(q + i) * load(key + i, part);
    });
    return total;
}

// q . k_s of n entries; up to LANES - 1 more numbers are written.
template <class T, int W>
void dot_products(const float* q, const T* keys, int64_t stride, int64_t n, int64_t width,
                  float* scores) {
    for (int64_t s = 0; s < n; s += LANES) {
        const T* key = keys + s * stride;
        const int rest = n - s < LANES ? static_cast<int>(n - s) : LANES;
        Vec sums[LANES] = {};
        if (rest == LANES)
            for (int k = 0; k < LANES; k++) sums[k] = products<T, W>(q, key + k * stride, width);
        else
            for (int k = 0; k < rest; k++) sums[k] = products<T, W>(q, key + k * stride, width);
        for (int count = LANES / 2; count; count /= 2)
            for (int k = 0; k < count; k++) sums[k] = add_pairs(sums[2 * k], sums[2 * k + 1]);
        store(scores + s, sums[0]);
    }
}

// The sum of 4 values by their weights.
template <class T, class Part>
inline Vec weighted(const float* w, const T* v, int64_t stride, Part part) {
    return (w[0] * load(v, part) + w[1] * load(v + stride, part)) +
           (w[2] * load(v + 2 * stride, part) + w[3] * load(v + 3 * stride, part));
}

// Add the values of n entries by their weights to `total` [Dh].
template <class T, int W>
void add_weighted(const float* weights, const T* values, int64_t stride, int64_t n, int64_t width,
                  float* total) {
    int64_t s = 0;
    if (W) {
        Vec sums[W + 1];
        for (int w = 0; w < W; w++) sums[w] = load(total + w * LANES);
        for (; s + 4 <= n; s += 4)
            for (int w = 0; w < W; w++)
                sums[w] += weighted(weights + s, values + s * stride + w * LANES, stride, Whole{});
        for (int w = 0; w < W; w++) store(total + w * LANES, sums[w]);
    }
    for (; s + 4 <= n; s += 4)
        for_columns<1>(width, [&](int64_t i, int, auto part) {
            const Vec added = weighted(weights + s, values + s * stride + i, stride, part);
            store(total + i, load(total + i) + added);
        });
    for (; s < n; s++)
        for_columns<1>(width, [&](int64_t i, int, auto part) {
            const Vec added = weights[s] * load(values + s * stride + i, part);
            store(total + i, load(total + i) + added);
        });
}

// scores -> exp2(score - maximum), padded to a multiple of LANES. Returns their sum: NaN if a score
// is NaN or infinity, 0 if there is none or all are minus infinity.
float exponentials(float* scores, int64_t n) {
    const float m = safe(row_maximum(scores, n));
    for (int64_t s = n; s % LANES; s++) scores[s] = -INF;
    Vec total = {}, invalid = {};
    for (int64_t s = 0; s < n; s += LANES) {
        const Vec d = load(scores + s) - m, p = exp2(d);
        invalid = d == d ? invalid : d;
        total += p;
        store(scores + s, p);
    }
    for (int i = 0; i < LANES; i++)
        if (invalid[i] != invalid[i]) return NOT_A_NUMBER;
    return static_cast<float>(sum(total));
}

template <class T, int W>
void attend(const Arguments& a, int64_t b, int64_t kv) {
    const int64_t width = a.width, half = width / 2, group = a.H / a.Hkv;
    const int64_t prefix = a.prefix_length(b), stored = a.lengths[b];
    const int64_t own = stored + a.appends(), n = prefix + own;
    const int64_t padded = (width + LANES - 1) / LANES * LANES;
    float* q = scratch.get<float>(3 * padded + n + LANES);
    float *total = q + padded, *scores = total + padded;
    T* rotated = reinterpret_cast<T*>(scores + n + LANES);
    const int64_t row = prefix + stored;
    const float *cos = a.cos + row * a.table_stride, *sin = a.sin + row * a.table_stride;
    const T *keys = a.keys.at<T>(b, kv), *values = a.values.at<T>(b, kv);
    const T *prefix_keys = nullptr, *prefix_values = nullptr;
    if (prefix) {
        prefix_keys = a.prefix_keys.at<T>(a.prefix_index[b], kv);
        prefix_values = a.prefix_values.at<T>(a.prefix_index[b], kv);
    }
    if (a.appends()) {
        rotate(a.new_key.at<const T>(b, kv), cos, sin, 1.0f, half, a.keys.at<T>(b, kv, stored));
        std::memcpy(a.values.at<T>(b, kv, stored), a.new_value.at<T>(b, kv), width * sizeof(T));
    }
    const float scale = static_cast<float>(a.scale * 1.4426950408889634);
    for (int64_t h = kv * group; h < (kv + 1) * group; h++) {
        const T* query = a.query.at<const T>(b, h);
        if (a.appends()) {
            rotate(query, cos, sin, 1.0f, half, rotated);
            query = rotated;
        }
        for_columns<1>(width, [&](int64_t i, int, auto part) {
            store(q + i, load(query + i, part) * scale);
            store(total + i, Vec{});
        });
        dot_products<T, W>(q, prefix_keys, a.prefix_keys.entry_stride, prefix, width, scores);
        dot_products<T, W>(q, keys, a.keys.entry_stride, own, width, scores + prefix);
        const float sum = exponentials(scores, n), weight = sum == 0 ? 1.0f : sum;
        add_weighted<T, W>(scores, prefix_values, a.prefix_values.entry_stride, prefix, width, total);
        add_weighted<T, W>(scores + prefix, values, a.values.entry_stride, own, width, total);
        T* context = a.context.at<T>(b, h);
        for_columns<1>(width, [&](int64_t i, int, auto part) {
            store(context + i, load(total + i) / weight, part);
        });
    }
}

template <int W>
void attend_all(const Arguments& a) {
    // Sequences with the same prefix follow one another: its head stays in the cache.
    for_rows(a.B * a.Hkv, static_cast<int>(a.threads), [&a](int64_t row) {
        if (a.is_bfloat16)
            attend<bfloat16, W>(a, row % a.B, row / a.B);
        else
            attend<float, W>(a, row % a.B, row / a.B);
    });
}

bool in_range(int64_t x, int64_t low, int64_t high) { return x >= low && x <= high; }

bool values_in_range(const Arguments& a) {
    for (int64_t b = 0; b < a.B; b++) {
        if (!in_range(a.lengths[b], 0, a.S - a.appends())) return false;
        if (a.prefix_keys.first && !(in_range(a.prefix_lengths[b], 0, a.prefix_S) &&
                                     in_range(a.prefix_index[b], -1, a.N - 1)))
            return false;
        if (a.appends() && a.prefix_length(b) + a.lengths[b] >= a.positions) return false;
    }
    return true;
}

}  // namespace

extern "C" {

// Returns whether all lengths, prefixes and positions exist; else nothing is written.
int iris_decode_attention(const char* packed) {
    Arguments a;
    std::memcpy(&a, packed, sizeof a);
    if (!values_in_range(a)) return 0;
    switch (a.width % LANES ? 0 : a.width / LANES) {
        case 1: attend_all<1>(a); break;
        case 2: attend_all<2>(a); break;
        case 4: attend_all<4>(a); break;
        case 8: attend_all<8>(a); break;
        default: attend_all<0>(a);
    }
    return 1;
}
}
