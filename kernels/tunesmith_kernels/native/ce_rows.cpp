// Rows of logits → loss, statistics and, in place, the gradient: tunesmith_kernels.linear_loss.rows has the formula.
//
// A row is read once and written once. Between, it lives in a scratch row of fp32 that fits the second-level cache.
// Rows are independent and each is computed by one thread, so that results do not depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "logit_rows.h"
#include "vector_math.h"

namespace {

struct Options {
    float label_smoothing, z_loss, focal_gamma, softcap, scale;
};

struct Row {
    int64_t vocab;
    int64_t target;      // −1: the target is soft
    const float *soft;   // [vocab] or null
    const float *weight; // [vocab] or null
    float token_weight;
    float factor;
    bool gradient;
};

struct Results {
    float loss, log_prob, entropy, lse;
    bool correct;
};

struct Sums {
    double total = 0;    // Σ exp(z − max)
    double weighted = 0; // Σ exp(z − max)·(z − max)
};

// z − max in, exp(z − max) out
Sums exponentials(float *z, int64_t begin, int64_t end, float top) {
    Sums sums;
    in_blocks(begin, end, [&](int64_t start, int64_t stop) {
        Lanes total, weighted;
        in_lanes(start, stop, [&](int64_t i, int64_t lane) {
            const float x = std::max(z[i] - top, -1e30f); // −inf · 0 would be NaN
            const float e = exp_nonpositive(x);
            z[i] = e;
            total.at[lane] += e;
            weighted.at[lane] += e * x;
        });
        sums.total += total.sum();
        sums.weighted += weighted.sum();
    });
    return sums;
}

// Σ a_v·(max − z_v) and Σ a_v over the classes, without the target's own (1−ε)·w; for soft targets also Σ q_v·(max − z_v)
struct Addends {
    double cross = 0, mass = 0, plain = 0;
    int64_t likeliest = 0;
};

Addends smoothed(const float *z, const Row &row, float share, float top) {
    Addends found;
    const float *w = row.weight;
    in_blocks(0, row.vocab, [&](int64_t start, int64_t stop) {
        Lanes cross, mass;
        in_lanes(start, stop, [&](int64_t i, int64_t lane) {
            const float own = w == nullptr ? 1.0f : w[i];
            cross.at[lane] += own == 0.0f ? 0.0f : own * (top - z[i]);
            mass.at[lane] += own;
        });
        found.cross += static_cast<double>(share) * cross.sum();
        found.mass += static_cast<double>(share) * mass.sum();
    });
    return found;
}

Addends distributed(const float *z, const Row &row, float keep, float share, float top) {
    Addends found;
    float best = -std::numeric_limits<float>::infinity();
    for (int64_t i = 0; i < row.vocab; ++i) {
        const float q = row.soft[i];
        const float a = (row.weight ? row.weight[i] : 1.0f) * (keep * q + share);
        const double below = static_cast<double>(top) - z[i];
        if (a != 0) found.cross += a * below;
        if (q != 0) found.plain += q * below;
        found.mass += a;
        if (q > best) best = q, found.likeliest = i;
    }
    return found;
}

template <class T, bool CAP>
void write(T *x, const float *e, const float *slope, const Row &row, float outer, float certain, float focal,
           float keep, float share) {
    const float *w = row.weight, *q = row.soft;
    const int64_t vocab = row.vocab;
    const float flat = focal * share;
    if (q != nullptr) {
#pragma omp simd
        for (int64_t i = 0; i < vocab; ++i) {
            const float a = (w ? w[i] : 1.0f) * (keep * q[i] + share);
            store(x, i, outer * (certain * e[i] - focal * a) * (CAP ? slope[i] : 1.0f));
        }
    } else if (w != nullptr && share != 0) {
#pragma omp simd
        for (int64_t i = 0; i < vocab; ++i)
            store(x, i, outer * (certain * e[i] - flat * w[i]) * (CAP ? slope[i] : 1.0f));
    } else {
#pragma omp simd
        for (int64_t i = 0; i < vocab; ++i)
            store(x, i, outer * (certain * e[i] - flat) * (CAP ? slope[i] : 1.0f));
    }
}

template <class T> Results poisoned(T *x, const Row &row) {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    if (row.gradient)
        for (int64_t i = 0; i < row.vocab; ++i) store(x, i, nan);
    return {nan, nan, nan, nan, false};
}

template <class T> Results compute(T *x, float *scratch, float *slope, const Row &row, const Options &o) {
    float top;
    const float poison = transform(x, scratch, slope, row.vocab, o.softcap, o.scale, top);
    if (poison != 0 || !std::isfinite(top)) return poisoned(x, row);

    const float keep = 1.0f - o.label_smoothing, share = o.label_smoothing / static_cast<float>(row.vocab);
    const int64_t target = row.target;
    const bool soft = row.soft != nullptr;
    Addends addends;
    if (soft)
        addends = distributed(scratch, row, keep, share, top);
    else if (share != 0)
        addends = smoothed(scratch, row, share, top);

    const float z_target = soft ? 0.0f : scratch[target];
    const bool correct = (soft ? scratch[addends.likeliest] : z_target) >= top;
    const int64_t split = soft ? row.vocab : target;
    const Sums before = exponentials(scratch, 0, split, top), after = exponentials(scratch, split + !soft, row.vocab, top);
    const double others = before.total + after.total;
    const float below = soft ? 0.0f : std::max(z_target - top, -1e30f);
    const double own = soft ? 0.0 : exp_nonpositive(below);
    const double total = others + own;
    const double log_total = !soft && below == 0 ? std::log1p(others + (own - 1.0)) : std::log(total);
    const double lse = top + log_total;

    Results found;
    found.correct = correct;
    found.lse = static_cast<float>(lse);
    found.entropy = static_cast<float>(log_total - (before.weighted + after.weighted + own * below) / total);
    double ce, log_prob, a_target = 0;
    if (soft) {
        double q_mass = 0;
        for (int64_t i = 0; i < row.vocab; ++i) q_mass += row.soft[i];
        log_prob = -(q_mass * log_total + addends.plain);
        ce = addends.mass * log_total + addends.cross;
    } else {
        log_prob = (std::isinf(z_target) ? z_target : below) - log_total;
        const double w = row.weight ? row.weight[target] : 1.0f;
        a_target = keep * w;
        ce = addends.mass * log_total + addends.cross - (a_target == 0 ? 0.0 : a_target * log_prob);
        addends.mass += a_target;
        a_target += share * w;
    }
    found.log_prob = static_cast<float>(log_prob);

    const double miss = others / total, s_target = own / total;
    double focal = 1, steep = 0;
    if (o.focal_gamma != 0) {
        focal = std::pow(miss, static_cast<double>(o.focal_gamma));
        steep = miss > 0 ? o.focal_gamma * focal / miss * s_target * ce : 0.0;
    }
    found.loss = static_cast<float>(row.token_weight * (focal * ce + o.z_loss * lse * lse));
    if (!row.gradient) return found;

    const double certain = focal * addends.mass + steep + 2.0 * o.z_loss * lse;
    const float outer = o.softcap == 0 ? row.factor * o.scale : row.factor; // a cap's slope holds the scale
    const float over_total = static_cast<float>(certain / total);
    if (!soft) scratch[target] = static_cast<float>(own);
    if (o.softcap == 0)
        write<T, false>(x, scratch, slope, row, outer, over_total, static_cast<float>(focal), keep, share);
    else
        write<T, true>(x, scratch, slope, row, outer, over_total, static_cast<float>(focal), keep, share);
    if (!soft) {
        // (F·A + K + 2ζ·lse)·s − F·a − K, without the cancellation in s − 1 where the row is nearly certain
        const double entry = focal * (addends.mass - a_target) + 2.0 * o.z_loss * lse - certain * miss;
        store(x, target, outer * static_cast<float>(entry) * (o.softcap == 0 ? 1.0f : slope[target]));
    }
    return found;
}

template <class T>
void rows(T *logits, int64_t count, int64_t vocab, const int64_t *target, const float *soft, const float *class_weight,
          const float *token_weight, const float *factor, const Options &options, float *loss, float *log_prob,
          float *entropy, float *lse, bool *correct) {
#pragma omp parallel
    {
        std::vector<float> scratch(vocab), slope(options.softcap == 0 ? 0 : vocab);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; ++i) {
            const Row row{vocab,
                          soft ? -1 : target[i],
                          soft ? soft + i * vocab : nullptr,
                          class_weight,
                          token_weight ? token_weight[i] : 1.0f,
                          factor ? factor[i] : 0.0f,
                          factor != nullptr};
            const Results found = compute(logits + i * vocab, scratch.data(), slope.data(), row, options);
            loss[i] = found.loss;
            log_prob[i] = found.log_prob;
            entropy[i] = found.entropy;
            lse[i] = found.lse;
            correct[i] = found.correct;
        }
    }
}

} // namespace

// logits [count, vocab]: fp32, or bf16 where `half`. Exactly one of target [count] and soft [count, vocab] is not null;
// class_weight [vocab], token_weight [count] and factor [count] may be null, without a factor no gradient is written.
extern "C" void tunesmith_ce_rows(int half, void *logits, int64_t count, int64_t vocab, const int64_t *target,
                                  const float *soft, const float *class_weight, const float *token_weight,
                                  const float *factor, float label_smoothing, float z_loss, float focal_gamma,
                                  float softcap, float scale, float *loss, float *log_prob, float *entropy, float *lse,
                                  bool *correct) {
    const Options options{label_smoothing, z_loss, focal_gamma, softcap, scale};
    if (half)
        rows(static_cast<uint16_t *>(logits), count, vocab, target, soft, class_weight, token_weight, factor, options,
             loss, log_prob, entropy, lse, correct);
    else
        rows(static_cast<float *>(logits), count, vocab, target, soft, class_weight, token_weight, factor, options, loss,
             log_prob, entropy, lse, correct);
}
