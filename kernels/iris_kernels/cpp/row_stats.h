// The statistics of one row of logits, as `_row_stats` describes them: fp32 terms, fp64 sums.
#pragma once

#include "columns.h"

namespace iris {

constexpr int64_t BLOCK = 64 * LANES;  // columns that are summed in fp32

// Sums over columns, with d = x - m and e = exp(d / T).
struct RowSums {
    double e = 0, ed = 0, d = 0;
};

struct RowStats {
    double logprob, nsc, entropy, lse, sum_exp;
};

// Add n columns to the sums; `distance(i, part)` is d of the columns from i on, and
// `exponential(i, d, part)` their e, of d not below -1000 T.
template <class Distance, class Exponential>
inline void add_columns(int64_t n, float T_, Distance distance, Exponential exponential,
                        RowSums& sums) {
    const Vec lowest = all(MIN_D * T_);
    for (int64_t first = 0; first < n; first += BLOCK) {
        Vec e_sum = {}, ed_sum = {}, d_sum = {};
        for_columns<1>(n - first < BLOCK ? n - first : BLOCK, [&](int64_t i, int, auto part) {
            Vec d = filled(distance(first + i, part), part, 0);
            d_sum += d;
            d = larger(d, lowest);
            const Vec e = filled(exponential(first + i, d, part), part, 0);
            e_sum += e;
            ed_sum += e * d;
        });
        sums.e += sum(e_sum);
        sums.ed += sum(ed_sum);
        sums.d += sum(d_sum);
    }
}

// Add the columns of x [n].
template <class T>
inline void add_columns(const T* x, int64_t n, float m, float T_, RowSums& sums) {
    const float scale = LOG2_E / T_;
    add_columns(
        n, T_, [=](int64_t i, auto part) { return load(x + i, part) - m; },
        [=](int64_t, Vec d, auto) { return exp2(d * scale); }, sums);
}

// The same with known exponentials e [n].
inline void add_columns(const float* x, const float* e, int64_t n, float m, float T_,
                        RowSums& sums) {
    add_columns(
        n, T_, [=](int64_t i, auto part) { return load(x + i, part) - m; },
        [=](int64_t i, Vec, auto part) { return load(e + i, part); }, sums);
}

// The statistics from the sums over all columns but the token's, whose logit is `x_token`;
// `others.d` includes it.
inline RowStats row_stats(const RowSums& others, float x_token, float maximum, float T, int64_t V) {
    const double minus_inf = -std::numeric_limits<double>::infinity();
    if (std::isnan(others.d)) {
        const double nan = NOT_A_NUMBER;
        return {nan, nan, nan, nan, nan};
    }
    if (maximum == -INF) return {minus_inf, minus_inf, 0, minus_inf, 1};
    const double d = (static_cast<double>(x_token) - maximum) / T;
    // e_token - 1 is exactly 0 if the token is the maximum: the digits of a small sum remain.
    const double below_one = std::expm1(d), rest = others.e + below_one;
    const double log_sum = std::log1p(rest), sum_exp = rest + 1;
    const double weighted = others.ed / T + (below_one + 1) * (d > MIN_D ? d : MIN_D);
    const double nsc = std::log(static_cast<double>(V)) - log_sum + others.d / T / V;
    return {d - log_sum, nsc < 0 ? nsc : 0, log_sum - weighted / sum_exp, double(maximum) / T + log_sum,
            sum_exp};
}

}  // namespace iris
