// `guided_sample` on a CPU. Per row: the mixed logits and both maxima; exponentials and the integer
// weights' sums per block of columns; the token's block, then its column; the statistics.

#include "row_stats.h"

using namespace iris;

namespace {

typedef int64_t Longs __attribute__((vector_size(8 * LANES)));

// Floating-point numbers that stay the same for all rows.
struct Options {
    float cfg_weight, temperature;
    bool guided;  // mixed / temperature differs from cond
    bool greedy;
};

// Places of column `step` of the caller's buffers, or of new tensors.
struct Results {
    int64_t* tokens;
    int64_t token_stride;
    float *conditional, *guided;
    int64_t statistic_stride, row_stride;
};

thread_local Scratch scratch;

constexpr float WEIGHT = 1099511627776.0f;  // 2^40

inline Vec mix(Vec cond, Vec uncond, float cfg_weight) {
    const Vec mixed = (cond - uncond) * cfg_weight + uncond;
    return ((cond == -INF) | (uncond == -INF)) ? all(-INF) : mixed;
}

// The mixed logits of a row into `mixed` [V]; their maximum without NaN.
template <class T>
float mix_row(const T* cond, const T* uncond, int64_t V, float cfg_weight, float* mixed) {
    Vec best = all(-INF);
    for_columns<1>(V, [&](int64_t i, int, auto part) {
        Vec x = load(cond + i, part);
        if (uncond) x = mix(x, load(uncond + i, part), cfg_weight);
        store(mixed + i, x, part);
        best = larger(filled(x, part, -INF), best);
    });
    return largest(best);
}

// floor(2^40 e), 0 below the threshold.
inline Longs weights(Vec e, Vec mixed, float threshold) {
    const Vec kept = (Vec)((Ints)(e * WEIGHT) & (mixed >= threshold));
    return __builtin_convertvector(kept, Longs);
}

inline int64_t sum(Longs v) {
    int64_t total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
}

// exp2((mixed - m) scale) of n columns into `e`, and the sum of the weights.
int64_t weigh_block(const float* mixed, int64_t n, float m, float scale, float threshold, float* e) {
    Longs total = {};
    for_columns<1>(n, [&](int64_t i, int, auto part) {
        const Vec x = filled(load(mixed + i, part), part, -INF), power = exp2((x - m) * scale);
        store(e + i, power, part);
        total += weights(power, x, threshold);
    });
    return sum(total);
}

// The first column whose cumulative weight exceeds uniform * total.
int64_t find_token(const float* mixed, const float* e, int64_t V, const int64_t* block_sums,
                   float threshold, float uniform) {
    const int64_t blocks = (V + BLOCK - 1) / BLOCK;
    int64_t total = 0;
    for (int64_t b = 0; b < blocks; b++) total += block_sums[b];
    if (total == 0) return 0;
    int64_t position = static_cast<int64_t>(double(uniform) * double(total));
    position = position < total - 1 ? position : total - 1;
    int64_t block = 0, before = 0;
    while (before + block_sums[block] <= position) before += block_sums[block++];
    for (int64_t i = block * BLOCK;; i++) {
        if (mixed[i] >= threshold) before += static_cast<int64_t>(e[i] * WEIGHT);
        if (before > position) return i;
    }
}

int64_t first_maximum(const float* mixed, int64_t V, float maximum) {
    for (int64_t i = 0; i < V; i++)
        if (mixed[i] == maximum) return i;
    return 0;
}

void write(const RowStats& s, float* place, int64_t stride) {
    const double values[4] = {s.logprob, s.nsc, s.entropy, s.lse};
    for (int i = 0; i < 4; i++) place[i * stride] = static_cast<float>(values[i]);
}

template <class T>
void sample_row(const T* cond, const T* uncond, int64_t V, float uniform, float threshold,
                const Options& options, int64_t row, const Results& out) {
    const int64_t blocks = (V + BLOCK - 1) / BLOCK, padded = blocks * BLOCK;
    float* mixed = scratch.get<float>(2 * padded + 2 * blocks);
    float* e = mixed + padded;
    int64_t* block_sums = reinterpret_cast<int64_t*>(e + padded);
    const float T_ = options.temperature, scale = LOG2_E / T_;
    const float mixed_maximum = mix_row(cond, uncond, V, options.cfg_weight, mixed);
    const float m = safe(mixed_maximum);
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t first = b * BLOCK, n = V - first < BLOCK ? V - first : BLOCK;
        block_sums[b] = weigh_block(mixed + first, n, m, scale, threshold, e + first);
    }
    const int64_t token = options.greedy
                              ? first_maximum(mixed, V, mixed_maximum)
                              : find_token(mixed, e, V, block_sums, threshold, uniform);
    out.tokens[row * out.token_stride] = token;

    RowSums sums;
    add_columns(mixed, e, token, m, T_, sums);
    add_columns(mixed + token + 1, e + token + 1, V - token - 1, m, T_, sums);
    sums.d += mixed[token] - m;
    const RowStats guided = row_stats(sums, mixed[token], mixed_maximum, T_, V);
    const int64_t place = row * out.row_stride;
    write(guided, out.guided + place, out.statistic_stride);
    if (!options.guided) {
        write(guided, out.conditional + place, out.statistic_stride);
        return;
    }
    const float maximum = row_maximum(cond, V), x_token = to_float(cond[token]);
    RowSums plain;
    add_columns(cond, token, safe(maximum), 1.0f, plain);
    add_columns(cond + token + 1, V - token - 1, safe(maximum), 1.0f, plain);
    plain.d += x_token - safe(maximum);
    write(row_stats(plain, x_token, maximum, 1.0f, V), out.conditional + place,
          out.statistic_stride);
}

template <class T>
void sample(const T* cond, Rows cond_rows, const T* uncond, Rows uncond_rows, int64_t R, int64_t V,
            const float* uniform, int64_t uniform_stride, const float* threshold, Options options,
            Results out, int threads) {
    for_rows(R, threads, [=](int64_t row) {
        sample_row(cond + cond_rows.start(row),
                   uncond ? uncond + uncond_rows.start(row) : nullptr, V,
                   uniform[row * uniform_stride], threshold ? threshold[row] : -INF, options, row,
                   out);
    });
}

}  // namespace

extern "C" {

// Returns whether every uniform is in [0, 1); else nothing is written.
int iris_guided_sample(int is_bfloat16, const void* cond, int64_t cond_inner, int64_t cond_outer,
                       int64_t cond_stride, const void* uncond, int64_t uncond_inner,
                       int64_t uncond_outer, int64_t uncond_stride, int64_t R, int64_t V,
                       const float* uniform, int64_t uniform_stride, const float* threshold,
                       float cfg_weight, float temperature, int greedy, int64_t* tokens,
                       int64_t token_stride, float* conditional, float* guided,
                       int64_t statistic_stride, int64_t row_stride, int threads) {
    for (int64_t row = 0; row < R; row++) {
        const float u = uniform[row * uniform_stride];
        if (!(u >= 0 && u < 1)) return 0;
    }
    const Options options{cfg_weight, temperature, uncond || temperature != 1.0f, greedy != 0};
    const Results out{tokens, token_stride, conditional, guided, statistic_stride, row_stride};
    const Rows cond_rows{cond_inner, cond_outer, cond_stride};
    const Rows uncond_rows{uncond_inner, uncond_outer, uncond_stride};
    if (is_bfloat16)
        sample(static_cast<const bfloat16*>(cond), cond_rows, static_cast<const bfloat16*>(uncond),
               uncond_rows, R, V, uniform, uniform_stride, threshold, options, out, threads);
    else
        sample(static_cast<const float*>(cond), cond_rows, static_cast<const float*>(uncond),
               uncond_rows, R, V, uniform, uniform_stride, threshold, options, out, threads);
    return 1;
}
}
