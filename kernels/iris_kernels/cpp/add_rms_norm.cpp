// `add_rms_norm` and the forward pass of `residual_rms_norm` on a CPU. Per row: the sum and its
// squares, then the norm.

#include "columns.h"

using namespace iris;

namespace {

template <class T>
struct Norm {
    const T* residual;
    T* total;  // may be `residual`
    const T* weight;
    T* norm;
    int64_t D;
    float eps;

    // `added(place, part)` is what is added to the elements from `place` on.
    template <class Added>
    void row(int64_t r, Added added) const {
        const int64_t first = r * D;
        ColumnSum squares;
        for_columns<SUMS>(D, [&](int64_t i, int k, auto part) {
            const Vec x = rounded<T>(load(residual + first + i, part) + added(first + i, part));
            store(total + first + i, x, part);
            squares.add(k, x * x);
        });
        finish(r, total + first, squares);
    }

    void row_alone(int64_t r) const {
        const T* x = residual + r * D;
        ColumnSum squares;
        for_columns<SUMS>(D, [&](int64_t i, int k, auto part) {
            const Vec v = load(x + i, part);
            squares.add(k, v * v);
        });
        finish(r, x, squares);
    }

    void finish(int64_t r, const T* x, const ColumnSum& squares) const {
        const float scale = static_cast<float>(1.0 / std::sqrt(squares.total() / D + eps));
        T* out = norm + r * D;
        for_columns<1>(D, [&](int64_t i, int, auto part) {
            store(out + i, load(weight + i, part) * rounded<T>(load(x + i, part) * scale), part);
        });
    }
};

template <class T>
void run(const T* residual, const void* delta, int64_t parts, const T* weight, T* total, T* norm,
         int64_t R, int64_t D, float eps, int threads) {
    const Norm<T> job{residual, total, weight, norm, D, eps};
    const T* one = static_cast<const T*>(delta);
    const float* several = static_cast<const float*>(delta);
    const int64_t size = R * D;
    for_rows(R, threads, [=](int64_t r) {
        if (!delta) {
            job.row_alone(r);
        } else if (!parts) {
            job.row(r, [=](int64_t place, auto part) { return load(one + place, part); });
        } else {
            job.row(r, [=](int64_t place, auto part) {
                Vec added = load(several + place, part);
                for (int64_t p = 1; p < parts; p++)
                    added += load(several + p * size + place, part);
                return rounded<T>(added);  // as a product is rounded
            });
        }
    });
}

}  // namespace

extern "C" {

// `delta` [R, D], or [parts, R, D] fp32 unless parts is 0, or nullptr: then `total` is not written.
void iris_add_rms_norm(int is_bfloat16, const void* residual, const void* delta, int64_t parts,
                       const void* weight, void* total, void* norm, int64_t R, int64_t D, float eps,
                       int threads) {
    if (is_bfloat16)
        run(static_cast<const bfloat16*>(residual), delta, parts,
            static_cast<const bfloat16*>(weight), static_cast<bfloat16*>(total),
            static_cast<bfloat16*>(norm), R, D, eps, threads);
    else
        run(static_cast<const float*>(residual), delta, parts, static_cast<const float*>(weight),
            static_cast<float*>(total), static_cast<float*>(norm), R, D, eps, threads);
}
}
