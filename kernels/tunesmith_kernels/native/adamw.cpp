// AdamW and the norm of gradients over many tensors at once. The formula is in adamw/reference.py; the arithmetic here
// is the same, operation by operation, so that the results are bitwise the same.
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")  // a fused multiply-add rounds once where torch rounds twice
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "bf16.h"
#include "rounding.h"

namespace {

// Tensors are cut into blocks of this many elements, whatever the number of threads.
constexpr int64_t kBlock = 131072;

enum Precision : int64_t { kFp32 = 0, kMaster = 1, kStochastic = 2, kStochasticFp32States = 3, kKahan = 4 };

// A tensor to update: addresses as integers; `extra` is 0 where the precision has none.
struct Row {
    int64_t param, grad, exp_avg, exp_avg_sq, extra, step, numel, stream, offset, group;
};

// The caller's table holds the fields one after the other, each for all tensors.
std::vector<Row> rows_of(const int64_t* table, int64_t count) {
    std::vector<Row> rows(count);
    for (int64_t i = 0; i < count; ++i) {
        const int64_t* field = table + i;
        rows[i] = {field[0],         field[count],     field[2 * count], field[3 * count], field[4 * count],
                   field[5 * count], field[6 * count], field[7 * count], field[8 * count], field[9 * count]};
    }
    return rows;
}

struct Settings {
    double precision, lr, beta1, beta2, eps, weight_decay;
};

struct Gradient {
    int64_t address, numel, is_bf16;
};

template <typename T>
T* at(int64_t address) {
    return reinterpret_cast<T*>(static_cast<intptr_t>(address));
}

// Where the blocks of each tensor begin in the list of all blocks; the last entry is their number.
template <typename Entry>
std::vector<int64_t> first_blocks(const Entry* entries, int64_t count) {
    std::vector<int64_t> first(count + 1, 0);
    for (int64_t i = 0; i < count; ++i) first[i + 1] = first[i] + (entries[i].numel + kBlock - 1) / kBlock;
    return first;
}

int64_t owner(const std::vector<int64_t>& first, int64_t block) {
    return std::upper_bound(first.begin(), first.end(), block) - first.begin() - 1;
}

struct Numbers {
    // the average moves by `weight1` × difference from itself or, where that is 0.5 and more, by the rest from the
    // gradient (as torch.lerp does: exact at the nearer end); a mask, since compilers do not vectorise the choice
    uint32_t from_average;
    float coefficient, weight1, beta2, weight2, decay, step_size, root_correction2, eps;
};

Numbers numbers(const Settings& s, float coefficient, double step) {
    const float weight1 = static_cast<float>(1.0 - s.beta1);
    const bool from_average = weight1 < 0.5f;
    return {
        from_average ? ~0u : 0u,
        coefficient,
        from_average ? weight1 : weight1 - 1.0f,
        static_cast<float>(s.beta2),
        static_cast<float>(1.0 - s.beta2),
        static_cast<float>(1.0 - s.lr * s.weight_decay),
        static_cast<float>(s.lr / (1.0 - std::pow(s.beta1, step))),
        static_cast<float>(std::sqrt(1.0 - std::pow(s.beta2, step))),
        static_cast<float>(s.eps),
    };
}

struct Element {
    float p, m, v;
};

// By value throughout: compilers do not vectorise around references to locals.
inline Element updated(float p, float raw_g, float old_m, float old_v, const Numbers n) {
    const float g = raw_g * n.coefficient;
    const uint32_t end = (float_to_bits(old_m) & n.from_average) | (float_to_bits(g) & ~n.from_average);
    const float m = bits_to_float(end) + (g - old_m) * n.weight1;
    const float v = old_v * n.beta2 + (n.weight2 * g) * g;
    return {p * n.decay - (n.step_size * m) / (std::sqrt(v) / n.root_correction2 + n.eps), m, v};
}

void update_fp32(const Row& row, int64_t start, int32_t count, const Numbers n) {
    float* __restrict p = at<float>(row.param) + start;
    const float* __restrict g = at<const float>(row.grad) + start;
    float* __restrict m = at<float>(row.exp_avg) + start;
    float* __restrict v = at<float>(row.exp_avg_sq) + start;
#pragma omp simd
    for (int32_t i = 0; i < count; ++i) {
        const Element e = updated(p[i], g[i], m[i], v[i], n);
        p[i] = e.p;
        m[i] = e.m;
        v[i] = e.v;
    }
}

void update_master(const Row& row, int64_t start, int32_t count, const Numbers n) {
    uint16_t* __restrict p = at<uint16_t>(row.param) + start;
    const uint16_t* __restrict g = at<const uint16_t>(row.grad) + start;
    float* __restrict m = at<float>(row.exp_avg) + start;
    float* __restrict v = at<float>(row.exp_avg_sq) + start;
    float* __restrict master = at<float>(row.extra) + start;
#pragma omp simd
    for (int32_t i = 0; i < count; ++i) {
        const Element e = updated(master[i], bf16_to_float(g[i]), m[i], v[i], n);
        master[i] = e.p;
        p[i] = float_to_bf16(e.p);
        m[i] = e.m;
        v[i] = e.v;
    }
}

// bfloat16s two at a time, as the halves of a 32-bit number (the first is the lower): that takes fewer instructions
// than widening and narrowing vectors.
inline uint32_t load_pair(const uint16_t* x) {
    uint32_t pair;
    std::memcpy(&pair, x, sizeof pair);
    return pair;
}
inline void store_pair(uint16_t* x, uint32_t pair) { std::memcpy(x, &pair, sizeof pair); }
inline float first_of(uint32_t pair) { return bits_to_float(pair << 16); }
inline float second_of(uint32_t pair) { return bits_to_float(pair & 0xffff0000u); }
inline uint32_t joined(uint32_t first, uint32_t second) { return (first >> 16) | (second & 0xffff0000u); }

// Like round_stochastically: rounded to nearest, ties to even; a NaN must be a quiet one.
inline uint32_t round_to_nearest(float value) {
    const uint32_t bits = float_to_bits(value);
    return bits + ((bits & 0x7fffffffu) <= 0x7f800000u ? 0x7fffu + ((bits >> 16) & 1u) : 0u);
}

// `key` and `low` as in rounding.h, `low` for the first element.
void update_stochastic_pairs(uint16_t* __restrict p, const uint16_t* __restrict g, uint16_t* __restrict m,
                             uint16_t* __restrict v, int32_t pairs, const Numbers n, uint32_t key, uint32_t low) {
#pragma omp simd
    for (int32_t i = 0; i < pairs; ++i) {
        const uint32_t draw1 = first_draw(low + 2u * static_cast<uint32_t>(i), key);
        const uint32_t draw2 = first_draw(low + 2u * static_cast<uint32_t>(i) + 1u, key);
        const uint32_t old_p = load_pair(p + 2 * i), new_g = load_pair(g + 2 * i);
        const uint32_t old_m = load_pair(m + 2 * i), old_v = load_pair(v + 2 * i);
        const Element e1 = updated(first_of(old_p), first_of(new_g), first_of(old_m), first_of(old_v), n);
        const Element e2 = updated(second_of(old_p), second_of(new_g), second_of(old_m), second_of(old_v), n);
        store_pair(p + 2 * i, joined(round_stochastically(e1.p, draw1 & 0xffffu),
                                     round_stochastically(e2.p, draw2 & 0xffffu)));
        store_pair(m + 2 * i,
                   joined(round_stochastically(e1.m, draw1 >> 16), round_stochastically(e2.m, draw2 >> 16)));
        store_pair(v + 2 * i, joined(round_stochastically(e1.v, second_draw(draw1, key) & 0xffffu),
                                     round_stochastically(e2.v, second_draw(draw2, key) & 0xffffu)));
    }
}

void update_stochastic(const Row& row, int64_t start, int32_t count, const Numbers& n, uint32_t key, uint32_t low) {
    uint16_t* p = at<uint16_t>(row.param) + start;
    const uint16_t* g = at<const uint16_t>(row.grad) + start;
    uint16_t* m = at<uint16_t>(row.exp_avg) + start;
    uint16_t* v = at<uint16_t>(row.exp_avg_sq) + start;
    update_stochastic_pairs(p, g, m, v, count / 2, n, key, low);
    if (const int32_t i = count - 1; count % 2) {
        uint16_t last_p[2] = {p[i]}, last_g[2] = {g[i]}, last_m[2] = {m[i]}, last_v[2] = {v[i]};
        update_stochastic_pairs(last_p, last_g, last_m, last_v, 1, n, key, low + static_cast<uint32_t>(i));
        p[i] = last_p[0];
        m[i] = last_m[0];
        v[i] = last_v[0];
    }
}

void update_stochastic_fp32_states(const Row& row, int64_t start, int32_t count, const Numbers n, uint32_t key,
                                   uint32_t low) {
    uint16_t* __restrict p = at<uint16_t>(row.param) + start;
    const uint16_t* __restrict g = at<const uint16_t>(row.grad) + start;
    float* __restrict m = at<float>(row.exp_avg) + start;
    float* __restrict v = at<float>(row.exp_avg_sq) + start;
#pragma omp simd
    for (int32_t i = 0; i < count; ++i) {
        const Element e = updated(bf16_to_float(p[i]), bf16_to_float(g[i]), m[i], v[i], n);
        const uint32_t draw = first_draw(low + static_cast<uint32_t>(i), key);
        p[i] = static_cast<uint16_t>(round_stochastically(e.p, draw & 0xffffu) >> 16);
        m[i] = e.m;
        v[i] = e.v;
    }
}

void update_kahan_pairs(uint16_t* __restrict p, const uint16_t* __restrict g, uint16_t* __restrict m,
                        uint16_t* __restrict v, uint16_t* __restrict c, int32_t pairs, const Numbers n, uint32_t key,
                        uint32_t low) {
#pragma omp simd
    for (int32_t i = 0; i < pairs; ++i) {
        const uint32_t draw1 = first_draw(low + 2u * static_cast<uint32_t>(i), key);
        const uint32_t draw2 = first_draw(low + 2u * static_cast<uint32_t>(i) + 1u, key);
        const uint32_t old_p = load_pair(p + 2 * i), new_g = load_pair(g + 2 * i), old_c = load_pair(c + 2 * i);
        const uint32_t old_m = load_pair(m + 2 * i), old_v = load_pair(v + 2 * i);
        const float whole1 = first_of(old_p) + first_of(old_c), whole2 = second_of(old_p) + second_of(old_c);
        const Element e1 = updated(whole1, first_of(new_g), first_of(old_m), first_of(old_v), n);
        const Element e2 = updated(whole2, second_of(new_g), second_of(old_m), second_of(old_v), n);
        const uint32_t new_p = joined(round_to_nearest(e1.p), round_to_nearest(e2.p));
        store_pair(p + 2 * i, new_p);
        store_pair(c + 2 * i,
                   joined(round_to_nearest(e1.p - first_of(new_p)), round_to_nearest(e2.p - second_of(new_p))));
        store_pair(m + 2 * i,
                   joined(round_stochastically(e1.m, draw1 >> 16), round_stochastically(e2.m, draw2 >> 16)));
        store_pair(v + 2 * i, joined(round_stochastically(e1.v, second_draw(draw1, key) & 0xffffu),
                                     round_stochastically(e2.v, second_draw(draw2, key) & 0xffffu)));
    }
}

void update_kahan(const Row& row, int64_t start, int32_t count, const Numbers& n, uint32_t key, uint32_t low) {
    uint16_t* p = at<uint16_t>(row.param) + start;
    const uint16_t* g = at<const uint16_t>(row.grad) + start;
    uint16_t* m = at<uint16_t>(row.exp_avg) + start;
    uint16_t* v = at<uint16_t>(row.exp_avg_sq) + start;
    uint16_t* c = at<uint16_t>(row.extra) + start;
    update_kahan_pairs(p, g, m, v, c, count / 2, n, key, low);
    if (const int32_t i = count - 1; count % 2) {
        uint16_t last_p[2] = {p[i]}, last_g[2] = {g[i]}, last_m[2] = {m[i]}, last_v[2] = {v[i]}, last_c[2] = {c[i]};
        update_kahan_pairs(last_p, last_g, last_m, last_v, last_c, 1, n, key, low + static_cast<uint32_t>(i));
        p[i] = last_p[0];
        m[i] = last_m[0];
        v[i] = last_v[0];
        c[i] = last_c[0];
    }
}

// The elements from `start` on; they share the upper half of their global index.
void update_run(const Row& row, int64_t start, int32_t count, int64_t precision, const Numbers& n, uint32_t key) {
    const uint64_t index = static_cast<uint64_t>(row.offset + start);
    const uint32_t high_key = rounding_key_of_high(key, static_cast<uint32_t>(index >> 32));
    const uint32_t low = static_cast<uint32_t>(index);
    switch (precision) {
        case kFp32: return update_fp32(row, start, count, n);
        case kMaster: return update_master(row, start, count, n);
        case kStochastic: return update_stochastic(row, start, count, n, high_key, low);
        case kStochasticFp32States: return update_stochastic_fp32_states(row, start, count, n, high_key, low);
        case kKahan: return update_kahan(row, start, count, n, high_key, low);
    }
}

void update_block(const Row& row, const Settings& settings, float coefficient, uint64_t seed, int64_t start) {
    const double step = static_cast<double>(*at<const float>(row.step)) + 1.0;
    const Numbers n = numbers(settings, coefficient, step);
    const uint32_t key = rounding_key(seed, static_cast<uint32_t>(step), static_cast<uint32_t>(row.stream));
    const int64_t end = std::min(start + kBlock, row.numel);
    while (start < end) {
        const int64_t left_of_high = (int64_t{1} << 32) - ((row.offset + start) & 0xffffffff);
        const int32_t count = static_cast<int32_t>(std::min(end - start, left_of_high));
        update_run(row, start, count, static_cast<int64_t>(settings.precision), n, key);
        start += count;
    }
}

inline double squared(float x) { return static_cast<double>(x) * static_cast<double>(x); }

// Several sums, added at the end: one would wait for each addition.
constexpr int kSums = 64;

double sum_of_squares(const float* __restrict x, int64_t count) {
    double sums[kSums] = {};
    int64_t i = 0;
    for (; i + kSums <= count; i += kSums) {
#pragma omp simd
        for (int j = 0; j < kSums; ++j) sums[j] += squared(x[i + j]);
    }
    double total = 0.0;
    for (const double sum : sums) total += sum;
    for (; i < count; ++i) total += squared(x[i]);
    return total;
}

double sum_of_squares(const uint16_t* __restrict x, int64_t count) {
    double sums[kSums] = {};
    int64_t i = 0;
    for (; i + 2 * kSums <= count; i += 2 * kSums) {
#pragma omp simd
        for (int j = 0; j < kSums; ++j) {
            const uint32_t pair = load_pair(x + i + 2 * j);
            sums[j] += squared(first_of(pair)) + squared(second_of(pair));
        }
    }
    double total = 0.0;
    for (const double sum : sums) total += sum;
    for (; i < count; ++i) total += squared(bf16_to_float(x[i]));
    return total;
}

}  // namespace

extern "C" {

// The 2-norm of all the gradients together; NaN or infinite where an element is.
double tunesmith_gradient_norm(const void* table, int64_t count, int threads) {
    const Gradient* gradients = static_cast<const Gradient*>(table);
    const std::vector<int64_t> first = first_blocks(gradients, count);
    const int64_t blocks = first[count];
    std::vector<double> sums(blocks);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t tensor = owner(first, block);
        const Gradient& gradient = gradients[tensor];
        const int64_t start = (block - first[tensor]) * kBlock;
        const int64_t length = std::min(kBlock, gradient.numel - start);
        sums[block] = gradient.is_bf16 ? sum_of_squares(at<const uint16_t>(gradient.address) + start, length)
                                       : sum_of_squares(at<const float>(gradient.address) + start, length);
    }
    double total = 0.0;
    for (const double sum : sums) total += sum;
    return std::sqrt(total);
}

// One update of `count` tensors. table: see rows_of; settings: one entry per group.
void tunesmith_adamw(const void* table, int64_t count, const void* settings, float coefficient, uint64_t seed,
                     int threads) {
    const std::vector<Row> rows = rows_of(static_cast<const int64_t*>(table), count);
    const Settings* groups = static_cast<const Settings*>(settings);
    const std::vector<int64_t> first = first_blocks(rows.data(), count);
    const int64_t blocks = first[count];
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t tensor = owner(first, block);
        const Row& row = rows[tensor];
        update_block(row, groups[row.group], coefficient, seed, (block - first[tensor]) * kBlock);
    }
    for (int64_t i = 0; i < count; ++i) *at<float>(rows[i].step) += 1.0f;
}
}
