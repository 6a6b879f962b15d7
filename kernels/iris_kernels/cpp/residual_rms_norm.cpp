// The backward pass of `residual_rms_norm` on a CPU; the forward pass is that of `add_rms_norm`.

#include "columns.h"

using namespace iris;

namespace {

constexpr int64_t COLUMNS = 512;  // of the weight's gradient that one thread adds up

template <class T>
struct Backward {
    const T *total, *weight, *d_norm, *d_total;
    T* d_x;
    int64_t D;
    float eps;

    // The gradient of a row; its share of the weight's gradient is written to `d_weight` if it is
    // the `first`, else added.
    void row(int64_t r, float* d_weight, bool first) const {
        const T *x = total + r * D, *upstream = d_norm + r * D;
        ColumnSum squares, products;
        for_columns<SUMS>(D, [&](int64_t i, int k, auto part) {
            const Vec v = load(x + i, part);
            squares.add(k, v * v);
            products.add(k, load(upstream + i, part) * load(weight + i, part) * v);
        });
        const double inverse = 1.0 / std::sqrt(squares.total() / D + eps);
        const float scale = static_cast<float>(inverse);
        const float share = static_cast<float>(products.total() / D * inverse * inverse);
        for_columns<1>(D, [&](int64_t i, int, auto part) {
            const Vec v = load(x + i, part), u = load(upstream + i, part);
            if (d_weight) {
                const Vec term = u * rounded<T>(v * scale);
                store(d_weight + i, first ? term : load(d_weight + i, part) + term, part);
            }
            Vec gradient = (u * load(weight + i, part) - v * share) * scale;
            if (d_total) gradient += load(d_total + r * D + i, part);
            store(d_x + r * D + i, gradient, part);
        });
    }
};

template <class T>
void run(const Backward<T>& job, float* partial, int64_t programs, T* d_weight, int64_t R,
         int threads) {
    const int64_t rows = (R + programs - 1) / programs, D = job.D;
    for_rows(programs, threads, [=](int64_t program) {
        const int64_t first = program * rows, last = first + rows < R ? first + rows : R;
        for (int64_t r = first; r < last; r++)
            job.row(r, partial ? partial + program * D : nullptr, r == first);
    });
    if (!partial) return;
    const int64_t used = (R + rows - 1) / rows;  // the last programs may have no rows
    for_rows((D + COLUMNS - 1) / COLUMNS, threads, [=](int64_t block) {
        const int64_t start = block * COLUMNS, n = D - start < COLUMNS ? D - start : COLUMNS;
        for_columns<1>(n, [&](int64_t i, int, auto part) {
            Vec sum = load(partial + start + i, part);
            for (int64_t p = 1; p < used; p++) sum += load(partial + p * D + start + i, part);
            store(d_weight + start + i, sum, part);
        });
    });
}

template <class T>
void dispatch(const void* total, const void* weight, const void* d_norm, const void* d_total,
              void* d_x, float* partial, int64_t programs, void* d_weight, int64_t R, int64_t D,
              float eps, int threads) {
    const Backward<T> job{static_cast<const T*>(total), static_cast<const T*>(weight),
                          static_cast<const T*>(d_norm), static_cast<const T*>(d_total),
                          static_cast<T*>(d_x), D, eps};
    run(job, partial, programs, static_cast<T*>(d_weight), R, threads);
}

}  // namespace

extern "C" {

// `d_total` may be nullptr; so may `partial` [programs, D] and `d_weight`, if the weight is frozen.
void iris_residual_rms_norm_backward(int is_bfloat16, const void* total, const void* weight,
                                     const void* d_norm, const void* d_total, void* d_x,
                                     float* partial, int64_t programs, void* d_weight, int64_t R,
                                     int64_t D, float eps, int threads) {
    const auto run = is_bfloat16 ? dispatch<bfloat16> : dispatch<float>;
    run(total, weight, d_norm, d_total, d_x, partial, programs, d_weight, R, D, eps, threads);
}
}
