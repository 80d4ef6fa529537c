// Rows of a student's logits and of a teacher → loss, statistics and, in place of the student's logits, the gradient:
// tunesmith_kernels.linear_loss.distillation_rows has the formula.
//
// Rows are independent and each is computed by one thread, so that results do not depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "logit_rows.h"
#include "vector_math.h"

namespace {

enum Divergence { FORWARD_KL, REVERSE_KL, JSD };

struct Options {
    int divergence;
    double beta;
    float temperature, kd_weight, ce_weight, softcap, scale, teacher_softcap, teacher_scale;
    bool tail;
    double tail_floor;
};

struct Row {
    int64_t vocab;
    int64_t target; // −1: none
    float token_weight;
    float factor;
    bool gradient;
    const int64_t *indices; // [k], the teacher's classes; null: it has logits
    const float *log_probs; // [k]
    int64_t k;
};

struct Results {
    float loss, kd, log_prob, entropy;
    bool agree;
};

// fp32 rows of one thread, [vocab] each
struct Scratch {
    std::vector<float> student, plain, slope, teacher, third;

    Scratch(int64_t vocab, const Options &o, bool logits)
        : student(vocab), plain(o.temperature == 1.0f ? 0 : vocab), slope(o.softcap == 0 ? 0 : vocab),
          teacher(logits ? vocab : 0), third(logits && (o.divergence == JSD || o.teacher_softcap != 0) ? vocab : 0) {}
};

constexpr float LOWEST = -1e30f;   // for a logit of −inf: −inf · 0 would be NaN
constexpr double INFINITE = 1e25;  // what is more came from LOWEST
constexpr double LEAST_TAIL = 1.6e-38; // exp_nonpositive gives 0 below this

// exp(x) − 1 for x ≤ 0
inline float expm1_nonpositive(float x) {
    const float bounded = std::max(x, -40.0f);
    const float n = std::nearbyintf(bounded * 1.44269504088896341f);
    const float r = (bounded - n * 0.693359375f) - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r;
    const float power = bits_to_float(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
    return power * p + (power - 1.0f);
}

// log(1 + w) for −1 < w ≤ 0. After Cephes' logf; the last term gives back what the sum 1 + w lost.
inline float log1p_nonpositive(float w) {
    const float s = 1.0f + w;
    const uint32_t bits = float_to_bits(s);
    const int32_t offset = static_cast<int32_t>(bits) - 0x3f3504f3; // √½, as bits: the mantissa goes to [√½, √2)
    const float e = static_cast<float>(offset >> 23);
    const float x = bits_to_float((static_cast<uint32_t>(offset) & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
    float p = 7.0376836292e-2f;
    p = p * x - 1.1514610310e-1f;
    p = p * x + 1.1676998740e-1f;
    p = p * x - 1.2420140846e-1f;
    p = p * x + 1.4249322787e-1f;
    p = p * x - 1.6668057665e-1f;
    p = p * x + 2.0000714765e-1f;
    p = p * x - 2.4999993993e-1f;
    p = p * x + 3.3333331174e-1f;
    const float square = x * x;
    float y = p * x * square - 2.12194440e-4f * e;
    y -= 0.5f * square;
    return (x + y) + 0.693359375f * e + (w - (s - 1.0f)) / s;
}

// log(p/m) and log(q/m) for m = βp + (1−β)q, from d = log p − log q; right to the last digits where p ≈ q too
inline void against_mixture(float d, float beta, float rest, float &log_p, float &log_q) {
    const bool up = d >= 0.0f;
    const float nearer = -log1p_nonpositive((up ? rest : beta) * expm1_nonpositive(up ? -d : d));
    log_p = up ? nearer : nearer + d;
    log_q = up ? nearer - d : nearer;
}

// Of the student at temperature 1 (e = exp(z − max)), and of both at the temperature
struct Sums {
    double plain = 0, weighted = 0; // Σ e, Σ e·(z − max)
    double q = 0, p = 0, cross = 0; // Σ exp(b), Σ exp(a); Σ exp(a)·(a − b), reverse KL: Σ exp(b)·(a − b − origin)
    bool agree = false;             // whether a class is the likeliest of both

    void operator+=(const Sums &o) {
        plain += o.plain, weighted += o.weighted, q += o.q, p += o.p, cross += o.cross, agree |= o.agree;
    }
};

// student: z in, exp(b) out, b = (z − max)/T. plain: exp(z − max), where T is not 1. teacher: logits in; out: exp(a) for
// forward KL, else a − b − origin. third: exp(a), for JSD.
template <int KIND, bool WARM>
Sums exponentials(Scratch &s, int64_t begin, int64_t end, float top, float teacher_top, float cooled,
                  float origin) {
    Sums sums;
    float *student = s.student.data(), *plain = s.plain.data(), *teacher = s.teacher.data(), *third = s.third.data();
    in_blocks(begin, end, [&](int64_t start, int64_t stop) {
        Lanes total, weighted, q, p, cross, both;
        in_lanes(start, stop, [&](int64_t i, int64_t lane) {
            const float x = std::max(student[i] - top, LOWEST), y = std::max(teacher[i] - teacher_top, LOWEST);
            const float e = exp_nonpositive(x);
            const float b = WARM ? x * cooled : x, a = WARM ? y * cooled : y;
            const float eb = WARM ? exp_nonpositive(b) : e, ea = exp_nonpositive(a);
            const float d = KIND == REVERSE_KL ? a - b - origin : a - b;
            total.at[lane] += e;
            weighted.at[lane] += e * x;
            q.at[lane] += eb;
            p.at[lane] += ea;
            if (KIND != JSD) cross.at[lane] += (KIND == FORWARD_KL ? ea : eb) * d;
            both.at[lane] += x + y == 0.0f ? 1.0f : 0.0f; // neither is above 0
            student[i] = eb;
            if (WARM) plain[i] = e;
            teacher[i] = KIND == FORWARD_KL ? ea : d;
            if (KIND == JSD) third[i] = ea;
        });
        sums += Sums{total.sum(), weighted.sum(), q.sum(), p.sum(), cross.sum(), both.sum() != 0};
    });
    return sums;
}

// The same without a teacher's logits
template <bool WARM> Sums student_exponentials(Scratch &s, int64_t begin, int64_t end, float top, float cooled) {
    Sums sums;
    float *student = s.student.data(), *plain = s.plain.data();
    in_blocks(begin, end, [&](int64_t start, int64_t stop) {
        Lanes total, weighted;
        in_lanes(start, stop, [&](int64_t i, int64_t lane) {
            const float x = std::max(student[i] - top, LOWEST);
            const float e = exp_nonpositive(x);
            total.at[lane] += e;
            weighted.at[lane] += e * x;
            student[i] = WARM ? exp_nonpositive(x * cooled) : e;
            if (WARM) plain[i] = e;
        });
        sums += Sums{total.sum(), weighted.sum(), 0, 0, 0, false};
    });
    return sums;
}

// The student at temperature 1
struct Plain {
    double total = 0, miss = 0; // Σ exp(z − max); 1 − s_target, without cancellation
    float log_prob = 0, entropy = 0;
};

// pass: [begin, end) → Sums. Adds all to `all`; the target is summed on its own.
template <class Pass> Plain plain_softmax(const Row &row, float z_target, float top, Sums &all, Pass pass) {
    Plain found;
    if (row.target < 0) {
        all = pass(0, row.vocab);
        found.total = all.plain;
    } else {
        all = pass(0, row.target);
        const Sums own = pass(row.target, row.target + 1);
        all += pass(row.target + 1, row.vocab);
        const double others = all.plain;
        all += own;
        found.total = all.plain;
        found.miss = others / found.total;
        const double log_total = z_target == top ? std::log1p(others) : std::log(found.total);
        found.log_prob = static_cast<float>(static_cast<double>(z_target) - top - log_total);
    }
    found.entropy = static_cast<float>(std::log(found.total) - all.weighted / found.total);
    return found;
}

Results finished(const Row &row, const Options &o, const Plain &plain, double divergence, bool agree) {
    if (divergence > INFINITE) divergence = std::numeric_limits<double>::infinity();
    const double kd = static_cast<double>(o.temperature) * o.temperature * divergence;
    double loss = o.kd_weight == 0 ? 0.0 : o.kd_weight * kd;
    if (o.ce_weight != 0) loss -= static_cast<double>(o.ce_weight) * plain.log_prob;
    return {static_cast<float>(row.token_weight * loss), static_cast<float>(kd), plain.log_prob, plain.entropy, agree};
}

// What multiplies a row's gradient by z: in fp64, so that each class's numbers are rounded once. A cap's slope holds the
// scale.
double outer(const Row &row, const Options &o) {
    return o.softcap == 0 ? static_cast<double>(row.factor) * o.scale : row.factor;
}

// x ← slope·(kd(i) + ce·e_i); kd(i): a row's gradient of the divergence, times `outer`
template <class T, class Kd>
void write(T *x, const Scratch &s, const Row &row, const Options &o, const Plain &plain, Kd kd) {
    const float *e = o.temperature == 1.0f ? s.student.data() : s.plain.data(), *slope = s.slope.data();
    const float ce = static_cast<float>(outer(row, o) * o.ce_weight / plain.total);
    if (o.softcap == 0) {
#pragma omp simd
        for (int64_t i = 0; i < row.vocab; ++i) store(x, i, kd(i) + ce * e[i]);
    } else {
#pragma omp simd
        for (int64_t i = 0; i < row.vocab; ++i) store(x, i, (kd(i) + ce * e[i]) * slope[i]);
    }
}

template <class T> void write_entry(T *x, int64_t i, double gradient, const Scratch &s, const Options &o) {
    store(x, i, static_cast<float>(o.softcap == 0 ? gradient : gradient * s.slope[i]));
}

template <class T> Results poisoned(T *x, const Row &row) {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    if (row.gradient)
        for (int64_t i = 0; i < row.vocab; ++i) store(x, i, nan);
    return {nan, nan, nan, nan, false};
}

// The greatest of the teacher's logits among the student's likeliest classes
float teacher_at_top(const Scratch &s, int64_t vocab, float top) {
    const float *student = s.student.data(), *teacher = s.teacher.data();
    Lanes best(-std::numeric_limits<float>::infinity());
    in_lanes(0, vocab, [&](int64_t i, int64_t lane) {
        const float known = best.at[lane];
        best.at[lane] = std::max(known, student[i] == top ? teacher[i] : known);
    });
    return best.max();
}

template <int KIND, bool WARM, class T, class U>
Results with_logits(T *x, const U *logits, Scratch &s, const Row &row, const Options &o) {
    float top, teacher_top;
    float poison = transform(x, s.student.data(), s.slope.data(), row.vocab, o.softcap, o.scale, top);
    poison += transform(logits, s.teacher.data(), s.third.data(), row.vocab, o.teacher_softcap, o.teacher_scale, teacher_top);
    if (poison != 0 || !std::isfinite(top) || !std::isfinite(teacher_top)) return poisoned(x, row);

    const float cooled = 1.0f / o.temperature, z_target = row.target < 0 ? 0.0f : s.student[row.target];
    // d is counted from the class that has most of q: there (log q − log p) − D cancels, of reverse KL's gradient
    const float at_top = KIND == REVERSE_KL ? teacher_at_top(s, row.vocab, top) : 0.0f;
    const float origin = KIND == REVERSE_KL ? std::max(at_top - teacher_top, LOWEST) * cooled : 0.0f;
    Sums sums;
    const Plain plain = plain_softmax(row, z_target, top, sums, [&](int64_t begin, int64_t end) {
        return exponentials<KIND, WARM>(s, begin, end, top, teacher_top, cooled, origin);
    });
    const double shift = std::log(sums.p) - std::log(sums.q); // log p − log q = a − b − shift
    const float *eb = s.student.data(), *ea = s.teacher.data(), *third = s.third.data();
    float *d = s.teacher.data();
    double divergence, mean_log_q = 0, mean_d = 0;
    if (KIND == FORWARD_KL) {
        divergence = sums.cross / sums.p - shift;
    } else if (KIND == REVERSE_KL) {
        mean_d = sums.cross / sums.q;
        divergence = shift - origin - mean_d;
    } else {
        const float beta = static_cast<float>(o.beta), rest = static_cast<float>(1.0 - o.beta);
        const float moved = static_cast<float>(shift);
        double of_p = 0, of_q = 0;
        in_blocks(0, row.vocab, [&](int64_t start, int64_t stop) {
            Lanes sum_p, sum_q;
            in_lanes(start, stop, [&](int64_t i, int64_t lane) {
                float log_p, log_q;
                against_mixture(d[i] - moved, beta, rest, log_p, log_q);
                sum_p.at[lane] += third[i] * log_p;
                sum_q.at[lane] += eb[i] * log_q;
                d[i] = log_q;
            });
            of_p += sum_p.sum(), of_q += sum_q.sum();
        });
        mean_log_q = of_q / sums.q;
        divergence = o.beta * of_p / sums.p + (1.0 - o.beta) * mean_log_q;
    }
    const Results found = finished(row, o, plain, divergence, sums.agree);
    if (!row.gradient) return found;

    const double all = outer(row, o), kd_all = all * o.kd_weight * o.temperature; // T² of the loss, 1/T of the logits
    const auto put = [&](auto kd) {
        const double at_target = row.target < 0 ? 0.0 : kd(row.target);
        write(x, s, row, o, plain, kd);
        if (row.target >= 0) write_entry(x, row.target, at_target - all * o.ce_weight * plain.miss, s, o);
    };
    if (KIND == FORWARD_KL) {
        const float of_q = static_cast<float>(kd_all / sums.q), of_p = static_cast<float>(kd_all / sums.p);
        put([=](int64_t i) { return of_q * eb[i] - of_p * ea[i]; });
    } else if (KIND == REVERSE_KL) {
        const float of_q = static_cast<float>(kd_all / sums.q), centre = static_cast<float>(mean_d);
        put([=](int64_t i) { return of_q * eb[i] * (centre - d[i]); });
    } else {
        const float of_q = static_cast<float>(kd_all * (1.0 - o.beta) / sums.q);
        const float centre = static_cast<float>(mean_log_q);
        put([=](int64_t i) { return of_q * eb[i] * (d[i] - centre); });
    }
    return found;
}

// The divergence of distributions over few classes, and in `gradient` its gradient by their logits: log_q's
double of_buckets(const std::vector<double> &log_p, const std::vector<double> &log_q, const Options &o,
                  std::vector<double> &gradient) {
    const size_t count = log_p.size();
    double divergence = 0, mass = 0, mean_log_q = 0;
    for (size_t j = 0; j < count; ++j) {
        const double p = std::exp(log_p[j]), q = std::exp(log_q[j]), d = log_p[j] - log_q[j];
        if (o.divergence == FORWARD_KL) {
            if (p != 0) divergence += p * d;
            mass += p;
            gradient[j] = -p;
        } else if (o.divergence == REVERSE_KL) {
            if (q != 0) divergence -= q * d;
            gradient[j] = q == 0 ? 0.0 : -q * d;
        } else {
            const bool up = d >= 0;
            const double nearer = -std::log1p((up ? 1 - o.beta : o.beta) * std::expm1(up ? -d : d));
            const double of_p = up ? nearer : nearer + d, of_q = up ? nearer - d : nearer;
            if (p != 0) divergence += o.beta * p * of_p;
            if (q != 0) mean_log_q += q * of_q;
            gradient[j] = q == 0 ? 0.0 : (1 - o.beta) * q * of_q;
        }
    }
    if (o.divergence == JSD) divergence += (1 - o.beta) * mean_log_q;
    const double centre = o.divergence == FORWARD_KL   ? -mass
                          : o.divergence == REVERSE_KL ? divergence
                                                       : (1 - o.beta) * mean_log_q;
    for (size_t j = 0; j < count; ++j) gradient[j] -= std::exp(log_q[j]) * centre;
    return divergence;
}

void normalise(std::vector<double> &logs) {
    const double top = *std::max_element(logs.begin(), logs.end());
    double total = 0;
    for (const double value : logs) total += std::exp(value - top);
    for (double &value : logs) value -= top + std::log(total);
}

template <bool WARM, class T> Results with_top_k(T *x, Scratch &s, const Row &row, const Options &o) {
    float top;
    const float poison = transform(x, s.student.data(), s.slope.data(), row.vocab, o.softcap, o.scale, top);
    if (poison != 0 || !std::isfinite(top)) return poisoned(x, row);

    std::vector<double> log_p(row.log_probs, row.log_probs + row.k), log_q(row.k), below(row.k);
    const float likeliest = *std::max_element(row.log_probs, row.log_probs + row.k);
    bool agree = false;
    for (int64_t j = 0; j < row.k; ++j) {
        const float z = s.student[row.indices[j]];
        below[j] = static_cast<double>(z) - top;
        agree |= row.log_probs[j] == likeliest && z == top;
    }
    const float cooled = 1.0f / o.temperature, z_target = row.target < 0 ? 0.0f : s.student[row.target];
    Sums sums;
    const Plain plain = plain_softmax(row, z_target, top, sums, [&](int64_t begin, int64_t end) {
        return student_exponentials<WARM>(s, begin, end, top, cooled);
    });
    const float *eb = s.student.data();
    for (int64_t j = 0; j < row.k; ++j) s.student[row.indices[j]] = 0.0f;
    double outside = 0;
    in_blocks(0, row.vocab, [&](int64_t start, int64_t stop) {
        Lanes sum;
        in_lanes(start, stop, [&](int64_t i, int64_t lane) { sum.at[lane] += eb[i]; });
        outside += sum.sum();
    });

    for (int64_t j = 0; j < row.k; ++j) log_q[j] = below[j] / o.temperature;
    const bool tail = o.tail && row.k < row.vocab;
    if (tail) {
        double mass = 0;
        for (const double value : log_p) mass += std::exp(value);
        log_p.push_back(std::log(std::max(1.0 - mass, o.tail_floor)));
        outside = std::max(outside, LEAST_TAIL);
        log_q.push_back(std::log(outside));
    }
    if (!o.tail) normalise(log_p);
    normalise(log_q);
    std::vector<double> gradient(log_p.size());
    const double divergence = of_buckets(log_p, log_q, o, gradient);
    const Results found = finished(row, o, plain, divergence, agree);
    if (!row.gradient) return found;

    const double all = outer(row, o), kd_all = all * o.kd_weight * o.temperature, ce_all = all * o.ce_weight;
    const float by_tail = tail ? static_cast<float>(kd_all * gradient.back() / outside) : 0.0f;
    const double at_target = row.target < 0 ? 0.0 : by_tail * eb[row.target];
    write(x, s, row, o, plain, [=](int64_t i) { return by_tail * eb[i]; });
    if (row.target >= 0) write_entry(x, row.target, at_target - ce_all * plain.miss, s, o);
    for (int64_t j = 0; j < row.k; ++j) {
        const int64_t i = row.indices[j];
        const double ce = i == row.target ? -plain.miss : std::exp(below[j]) / plain.total;
        write_entry(x, i, kd_all * gradient[j] + ce_all * ce, s, o);
    }
    return found;
}

template <class T, class U> Results compute(T *x, const U *teacher, Scratch &s, const Row &row, const Options &o) {
    const bool warm = o.temperature != 1.0f;
    if (row.indices != nullptr) return warm ? with_top_k<true>(x, s, row, o) : with_top_k<false>(x, s, row, o);
    switch (o.divergence) {
    case FORWARD_KL:
        return warm ? with_logits<FORWARD_KL, true>(x, teacher, s, row, o)
                    : with_logits<FORWARD_KL, false>(x, teacher, s, row, o);
    case REVERSE_KL:
        return warm ? with_logits<REVERSE_KL, true>(x, teacher, s, row, o)
                    : with_logits<REVERSE_KL, false>(x, teacher, s, row, o);
    default:
        return warm ? with_logits<JSD, true>(x, teacher, s, row, o) : with_logits<JSD, false>(x, teacher, s, row, o);
    }
}

struct Batch {
    int64_t count, vocab, k;
    const int64_t *indices, *target;
    const float *log_probs, *token_weight, *factor;
    float *loss, *kd, *log_prob, *entropy;
    bool *agree;
};

template <class T, class U> void rows(T *logits, const U *teacher, const Batch &b, const Options &o) {
#pragma omp parallel
    {
        Scratch scratch(b.vocab, o, b.indices == nullptr);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < b.count; ++i) {
            const Row row{b.vocab,
                          b.target ? b.target[i] : -1,
                          b.token_weight ? b.token_weight[i] : 1.0f,
                          b.factor ? b.factor[i] : 0.0f,
                          b.factor != nullptr,
                          b.indices ? b.indices + i * b.k : nullptr,
                          b.log_probs ? b.log_probs + i * b.k : nullptr,
                          b.k};
            const U *of_teacher = teacher ? teacher + i * b.vocab : nullptr;
            const Results found = compute(logits + i * b.vocab, of_teacher, scratch, row, o);
            b.loss[i] = found.loss;
            b.kd[i] = found.kd;
            b.log_prob[i] = found.log_prob;
            b.entropy[i] = found.entropy;
            b.agree[i] = found.agree;
        }
    }
}

template <class T> void rows(T *logits, int teacher_half, const void *teacher, const Batch &b, const Options &o) {
    if (teacher_half)
        rows(logits, static_cast<const uint16_t *>(teacher), b, o);
    else
        rows(logits, static_cast<const float *>(teacher), b, o);
}

} // namespace

// logits and teacher [count, vocab]: fp32, or bf16 where `half` or `teacher_half`; instead of teacher there may be indices
// and log_probs [count, k]. target, token_weight and factor [count] may be null, without a factor no gradient is written.
extern "C" void tunesmith_distillation_rows(int half, void *logits, int64_t count, int64_t vocab, int teacher_half,
                                            const void *teacher, const int64_t *indices, const float *log_probs,
                                            int64_t k, const int64_t *target, const float *token_weight,
                                            const float *factor, int divergence, double beta, float temperature,
                                            float kd_weight, float ce_weight, float softcap, float scale,
                                            float teacher_softcap, float teacher_scale, int tail, double tail_floor,
                                            float *loss, float *kd, float *log_prob, float *entropy, bool *agree) {
    const Options options{divergence, beta,  temperature,     kd_weight,     ce_weight, softcap,
                          scale,      teacher_softcap, teacher_scale, tail != 0, tail_floor};
    const Batch batch{count,  vocab, k,        indices, target, log_probs, token_weight,
                      factor, loss,  kd, log_prob, entropy, agree};
    if (half)
        rows(static_cast<uint16_t *>(logits), teacher_half, teacher, batch, options);
    else
        rows(static_cast<float *>(logits), teacher_half, teacher, batch, options);
}
