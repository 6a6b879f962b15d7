// `rope_append` on a CPU: rotated query out, rotated key and value into the caches.

#include "rotation.h"

using namespace iris;

namespace {

struct Slots {
    const void* slots;
    bool wide;  // int64, else int32
    int64_t at(int64_t b) const {
        return wide ? static_cast<const int64_t*>(slots)[b] : static_cast<const int32_t*>(slots)[b];
    }
};

// Query, key, value, key cache, value cache: address, and strides of sequence, head and slot.
struct Tensor {
    void* first;
    int64_t sequence, head, slot;
};

template <class T>
T* place(const Tensor& t, int64_t b, int64_t h, int64_t slot = 0) {
    return static_cast<T*>(t.first) + b * t.sequence + h * t.head + slot * t.slot;
}

template <class T>
void run(const Tensor* tensors, const float* cos, const float* sin, int64_t table_stride,
         Slots slots, T* rotated, int64_t B, int64_t H, int64_t kv_heads, int64_t half,
         int threads) {
    for_rows(B, threads, [=](int64_t b) {
        const float *c = cos + b * table_stride, *s = sin + b * table_stride;
        const int64_t slot = slots.at(b);
        for (int64_t h = 0; h < H; h++)
            rotate(place<const T>(tensors[0], b, h), c, s, 1.0f, half,
                   rotated + (b * H + h) * 2 * half);
        for (int64_t h = 0; h < kv_heads; h++) {
            rotate(place<const T>(tensors[1], b, h), c, s, 1.0f, half,
                   place<T>(tensors[3], b, h, slot));
            std::memcpy(place<T>(tensors[4], b, h, slot), place<const T>(tensors[2], b, h),
                        2 * half * sizeof(T));
        }
    });
}

}  // namespace

extern "C" {

// `places`: address and strides of each of the five tensors, as in `Tensor`. Returns whether all
// slots are in [0, S); else nothing is written.
int iris_rope_append(int is_bfloat16, const int64_t places[20], const float* cos, const float* sin,
                     int64_t table_stride, const void* slots, int wide, int64_t S, void* rotated,
                     int64_t B, int64_t H, int64_t kv_heads, int64_t half, int threads) {
    const Slots of{slots, wide != 0};
    for (int64_t b = 0; b < B; b++)
        if (of.at(b) < 0 || of.at(b) >= S) return 0;
    Tensor tensors[5];
    for (int i = 0; i < 5; i++) {
        const int64_t* p = places + 4 * i;
        tensors[i] = {reinterpret_cast<void*>(p[0]), p[1], p[2], p[3]};
    }
    if (is_bfloat16)
        run(tensors, cos, sin, table_stride, of, static_cast<bfloat16*>(rotated), B, H, kv_heads,
            half, threads);
    else
        run(tensors, cos, sin, table_stride, of, static_cast<float*>(rotated), B, H, kv_heads, half,
            threads);
    return 1;
}
}
