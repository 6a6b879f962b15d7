// `rope` on a CPU: query and key of a row, head by head.

#include "rotation.h"

using namespace iris;

namespace {

template <class T>
void run(const void* query, int64_t H, int64_t q_row, int64_t q_head, const void* key,
         int64_t kv_heads, int64_t k_row, int64_t k_head, const float* cos, const float* sin,
         int64_t table_stride, int64_t R, int64_t half, int backwards, void* rotated_query,
         void* rotated_key, int threads) {
    const Heads<const T> from[2] = {{static_cast<const T*>(query), H, q_row, q_head},
                                    {static_cast<const T*>(key), kv_heads, k_row, k_head}};
    T* const to[2] = {static_cast<T*>(rotated_query), static_cast<T*>(rotated_key)};
    const float sign = backwards ? -1.0f : 1.0f;
    for_rows(R, threads, [=](int64_t row) {
        const float *c = cos + row * table_stride, *s = sin + row * table_stride;
        for (int t = 0; t < 2; t++)
            for (int64_t h = 0; h < from[t].count; h++)
                rotate(from[t].at(row, h), c, s, sign, half,
                       to[t] + (row * from[t].count + h) * 2 * half);
    });
}

}  // namespace

extern "C" {

// The rotated tensors are contiguous.
void iris_rope(int is_bfloat16, const void* query, int64_t H, int64_t q_row, int64_t q_head,
               const void* key, int64_t kv_heads, int64_t k_row, int64_t k_head, const float* cos,
               const float* sin, int64_t table_stride, int64_t R, int64_t half, int backwards,
               void* rotated_query, void* rotated_key, int threads) {
    const auto run = is_bfloat16 ? ::run<bfloat16> : ::run<float>;
    run(query, H, q_row, q_head, key, kv_heads, k_row, k_head, cos, sin, table_stride, R, half,
        backwards, rotated_query, rotated_key, threads);
}
}
