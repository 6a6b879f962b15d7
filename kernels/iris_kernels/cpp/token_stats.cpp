// `token_stats` on a CPU: one pass for the row's maximum, one for its sums; backward one pass.

#include "row_stats.h"

using namespace iris;

namespace {

constexpr int64_t IGNORED = -100;  // the id of a row without a token

struct Tokens {
    const void* ids;
    bool wide;            // int64, else int32
    const uint8_t* mask;  // or nullptr
    int64_t id(int64_t row) const {
        return wide ? static_cast<const int64_t*>(ids)[row] : static_cast<const int32_t*>(ids)[row];
    }
    bool kept(int64_t row) const { return id(row) != IGNORED && (!mask || mask[row]); }
};

bool all_in_range(Tokens tokens, int64_t R, int64_t V) {
    for (int64_t row = 0; row < R; row++) {
        const int64_t id = tokens.id(row);
        if ((id < 0 || id >= V) && tokens.kept(row)) return false;
    }
    return true;
}

template <class T>
void forward(const T* logits, int64_t R, Rows rows, int64_t V, Tokens tokens, float temperature,
             float* const out[6], int threads) {
    for_rows(R, threads, [=](int64_t row) {
        if (!tokens.kept(row)) {
            for (int i = 0; i < 6; i++) out[i][row] = 0;
            return;
        }
        const T* x = logits + rows.start(row);
        const int64_t token = tokens.id(row);
        const float maximum = row_maximum(x, V), m = safe(maximum), x_token = to_float(x[token]);
        RowSums sums;
        add_columns(x, token, m, temperature, sums);
        add_columns(x + token + 1, V - token - 1, m, temperature, sums);
        sums.d += x_token - m;
        const RowStats s = row_stats(sums, x_token, maximum, temperature, V);
        const double values[6] = {s.logprob, s.nsc, s.entropy, s.lse, maximum, s.sum_exp};
        for (int i = 0; i < 6; i++) out[i][row] = static_cast<float>(values[i]);
    });
}

// gradient_j = e_j (of_e - of_ed d_j) + of_all + 1[j = token] of_token
struct Factors {
    float of_e, of_ed, of_all, of_token;
};

Factors factors(const float* const upstream[4], int64_t row, float sum_exp, float entropy,
                float temperature, int64_t V) {
    double g[4];  // logprob, nsc, entropy, lse
    for (int i = 0; i < 4; i++) g[i] = upstream[i] ? upstream[i][row] / double(temperature) : 0.0;
    double of_e = g[3] - g[0] - g[1];
    if (upstream[2]) of_e += g[2] * (std::log(double(sum_exp)) - entropy);
    return {float(of_e / sum_exp), float(g[2] / sum_exp / temperature), float(g[1] / V),
            float(g[0])};
}

template <class T>
void fill_zero(T* p, int64_t n) {
    std::memset(p, 0, n * sizeof(T));
}

template <class T>
void backward(const T* logits, Rows rows, T* grad, Rows grad_rows, int64_t R, int64_t V,
              int64_t V_held, Tokens tokens, float temperature, const float* row_max,
              const float* sum_exp, const float* entropy, const float* const upstream[4],
              int threads) {
    const float scale = LOG2_E / temperature;
    const Vec lowest = all(MIN_D * temperature);
    for_rows(R, threads, [=](int64_t row) {
        const T* x = logits + rows.start(row);
        T* g = grad + grad_rows.start(row);
        if (!tokens.kept(row)) {
            fill_zero(g, V_held);
            return;
        }
        const float m = safe(row_max[row]);
        const int64_t token = tokens.id(row);
        const float x_token = to_float(x[token]);  // `grad` may be `logits`
        const Factors f = factors(upstream, row, sum_exp[row], entropy[row], temperature, V);
        const auto of_column = [&](Vec x) {
            // `larger` drops NaN, but the factors of a row with NaN are NaN.
            const Vec d = larger(x - m, lowest);
            return exp2(d * scale) * (f.of_e - d * f.of_ed) + f.of_all;
        };
        for_columns<1>(V, [&](int64_t i, int, auto part) {
            store(g + i, of_column(load(x + i, part)), part);
        });
        g[token] = from_float<T>(of_column(all(x_token))[0] + f.of_token);
        fill_zero(g + V, V_held - V);
    });
}

}  // namespace

extern "C" {

// Identifies the sources: see build.py.
const char* iris_sources() { return IRIS_SOURCES; }

// Returns whether the ids of all rows that are kept are in [0, V); else nothing is written.
int iris_token_stats(int is_bfloat16, const void* logits, int64_t inner, int64_t outer_stride,
                     int64_t inner_stride, int64_t R, int64_t V, const void* ids, int wide,
                     const uint8_t* mask, float temperature, float* logprob, float* nsc,
                     float* entropy, float* lse, float* row_max, float* sum_exp, int threads) {
    const Rows rows{inner, outer_stride, inner_stride};
    const Tokens tokens{ids, wide != 0, mask};
    if (!all_in_range(tokens, R, V)) return 0;
    float* const out[6] = {logprob, nsc, entropy, lse, row_max, sum_exp};
    if (is_bfloat16)
        forward(static_cast<const bfloat16*>(logits), R, rows, V, tokens, temperature, out, threads);
    else
        forward(static_cast<const float*>(logits), R, rows, V, tokens, temperature, out, threads);
    return 1;
}

// `grad` may be `logits`, with the same strides.
void iris_token_stats_backward(int is_bfloat16, const void* logits, int64_t inner,
                               int64_t outer_stride, int64_t inner_stride, void* grad,
                               int64_t grad_inner, int64_t grad_outer_stride,
                               int64_t grad_inner_stride, int64_t R, int64_t V, int64_t V_held,
                               const void* ids, int wide, const uint8_t* mask, float temperature,
                               const float* row_max, const float* sum_exp, const float* entropy,
                               const float* grad_logprob, const float* grad_nsc,
                               const float* grad_entropy, const float* grad_lse, int threads) {
    const Rows rows{inner, outer_stride, inner_stride};
    const Rows grad_rows{grad_inner, grad_outer_stride, grad_inner_stride};
    const Tokens tokens{ids, wide != 0, mask};
    const float* const upstream[4] = {grad_logprob, grad_nsc, grad_entropy, grad_lse};
    if (is_bfloat16)
        backward(static_cast<const bfloat16*>(logits), rows, static_cast<bfloat16*>(grad), grad_rows,
                 R, V, V_held, tokens, temperature, row_max, sum_exp, entropy, upstream, threads);
    else
        backward(static_cast<const float*>(logits), rows, static_cast<float*>(grad), grad_rows, R, V,
                 V_held, tokens, temperature, row_max, sum_exp, entropy, upstream, threads);
}
}
