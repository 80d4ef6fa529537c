// AdamW with 8-bit moments, one pass over the memory: a block's moments are decoded, updated and encoded again in
// buffers that stay in the first-level cache. What the numbers mean is in adamw8bit/tensors.py, the code books in
// adamw8bit/codebook.py. The arithmetic is that of adamw8bit/reference.py, operation by operation, so that the results
// are bitwise the same.
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")  // a fused multiply-add rounds once where torch rounds twice
#endif

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "bf16.h"
#include "rounding.h"

namespace {

constexpr int64_t kLargestBlock = 4096;

// Field for field what adamw8bit/cpu.py passes.
struct Book {
    const float *values;      // [256]
    const uint32_t *buckets;  // the code of a bucket's first number << 24 | the last low bits that have it
    int32_t shift;            // low bits of a number that do not choose its bucket
    int32_t first;            // bucket 0 is everything whose magnitude >> shift is at most this
    int32_t count;            // buckets of one sign
    int32_t negative;         // where the buckets of negative numbers begin; 0 if there are none
};

struct Entry {
    void *param;
    const void *grad;
    void *state1;
    void *state2;
    float *absmax1;  // null: the moments are fp32
    float *absmax2;
    int64_t numel;
    int64_t offset;           // the global index of the first element
    uint32_t rounding_key;    // of this update of this parameter
    float step_size;          // lr / (1 - beta1^t)
    float root_correction2;   // sqrt(1 - beta2^t)
};

struct Settings {
    float beta1, weight1, beta2, weight2, decay, eps, coefficient;
    int32_t block_size;
};

enum Kind : int32_t { kFp32 = 0, kBf16 = 1, kStochasticBf16 = 2 };

inline float load(float from) { return from; }
inline float load(uint16_t from) { return bf16_to_float(from); }

template <Kind kKind>
using Number = std::conditional_t<kKind == kFp32, float, uint16_t>;

template <Kind kKind>
inline Number<kKind> rounded(float value, uint32_t low, uint32_t key) {
    if constexpr (kKind == kFp32) return value;
    if constexpr (kKind == kBf16) return float_to_bf16(value);
    if constexpr (kKind == kStochasticBf16) return round_stochastically(value, first_draw(low, key) & 0xffffu) >> 16;
}

// n elements from `begin` on: their moments m and v, in place, and their parameters.
template <Kind kKind>
void update(const Entry &entry, int64_t begin, int64_t n, float *__restrict m, float *__restrict v,
            const Settings s) {
    Number<kKind> *__restrict param = static_cast<Number<kKind> *>(entry.param) + begin;
    const Number<kKind> *__restrict grad = static_cast<const Number<kKind> *>(entry.grad) + begin;
    const float step_size = entry.step_size, root_correction2 = entry.root_correction2;
    const uint64_t index = static_cast<uint64_t>(entry.offset + begin);
    const uint32_t low = static_cast<uint32_t>(index);
    const uint32_t key = rounding_key_of_high(entry.rounding_key, static_cast<uint32_t>(index >> 32));
    for (int64_t i = 0; i < n; ++i) {
        const float g = load(grad[i]) * s.coefficient;
        const float mean = m[i] * s.beta1 + g * s.weight1;
        const float square = v[i] * s.beta2 + (g * s.weight2) * g;
        const float denominator = std::sqrt(square) / root_correction2 + s.eps;
        const float moved = load(param[i]) * s.decay - (mean * step_size) / denominator;
        m[i] = mean;
        v[i] = square;
        param[i] = rounded<kKind>(moved, low + static_cast<uint32_t>(i), key);
    }
}

void decode(const uint8_t *__restrict codes, const Book &book, float absmax, float *__restrict to, int64_t n) {
    const float *__restrict values = book.values;
    for (int64_t i = 0; i < n; ++i) to[i] = values[codes[i]] * absmax;
}

// The largest magnitude; NaN where one is NaN. On the bits, since a maximum of floats would not be vectorised.
float largest(const float *__restrict from, int64_t n) {
    uint32_t bits = 0;
    for (int64_t i = 0; i < n; ++i) bits = std::max(bits, float_to_bits(from[i]) & 0x7fffffffu);
    return bits_to_float(bits);
}

template <bool kSigned>
float encode(const float *__restrict from, const Book &book, uint8_t *__restrict codes, int64_t n) {
    uint32_t chosen[kLargestBlock], numbers[kLargestBlock];
    const float absmax = largest(from, n);
    const float scale = absmax == 0.0f ? 1.0f : absmax;
    const int32_t first = book.first, last = book.count - 1, negative = book.negative, shift = book.shift;
    const uint32_t low = (1u << shift) - 1;
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t bits = float_to_bits(from[i] / scale);
        const int32_t magnitude = static_cast<int32_t>((bits & 0x7fffffffu) >> shift);
        int32_t bucket = std::min(std::max(magnitude - first, 0), last);
        if (kSigned) bucket += static_cast<int32_t>(bits >> 31) * negative;
        numbers[i] = bits;
        chosen[i] = static_cast<uint32_t>(bucket);
    }
    const uint32_t *__restrict buckets = book.buckets;
    for (int64_t i = 0; i < n; ++i) chosen[i] = buckets[chosen[i]];
    for (int64_t i = 0; i < n; ++i) {
        const int32_t beyond = (numbers[i] & low) > (chosen[i] & 0xffffffu);
        // away from 0 the codes of negative numbers fall
        const int32_t sign = kSigned ? -static_cast<int32_t>(numbers[i] >> 31) : 0;
        const int32_t code = static_cast<int32_t>(chosen[i] >> 24) + ((beyond ^ sign) - sign);
        const int32_t least = kSigned ? 0 : numbers[i] != 0;  // numbers above 0 share a bucket with it
        codes[i] = static_cast<uint8_t>(std::max(code, least));
    }
    return absmax;
}

// An update whose elements do not all share the upper half of their global index is made in two parts.
template <Kind kKind>
void update_across(const Entry &entry, int64_t begin, int64_t n, float *m, float *v, const Settings &s) {
    const int64_t left = (int64_t{1} << 32) - ((entry.offset + begin) & 0xffffffff);
    const int64_t head = std::min(n, left);
    update<kKind>(entry, begin, head, m, v, s);
    if (head < n) update<kKind>(entry, begin + head, n - head, m + head, v + head, s);
}

template <Kind kKind>
void step_block(const Entry &entry, int64_t block, const Settings &s, const Book &signed_book,
                const Book &unsigned_book) {
    const int64_t begin = block * s.block_size, n = std::min<int64_t>(s.block_size, entry.numel - begin);
    if (!entry.absmax1) {
        float *m = static_cast<float *>(entry.state1) + begin, *v = static_cast<float *>(entry.state2) + begin;
        update_across<kKind>(entry, begin, n, m, v, s);
        return;
    }
    alignas(64) float m[kLargestBlock], v[kLargestBlock];
    uint8_t *codes1 = static_cast<uint8_t *>(entry.state1) + begin;
    uint8_t *codes2 = static_cast<uint8_t *>(entry.state2) + begin;
    decode(codes1, signed_book, entry.absmax1[block], m, n);
    decode(codes2, unsigned_book, entry.absmax2[block], v, n);
    update_across<kKind>(entry, begin, n, m, v, s);
    entry.absmax1[block] = encode<true>(m, signed_book, codes1, n);
    entry.absmax2[block] = encode<false>(v, unsigned_book, codes2, n);
}

// The blocks of all tensors are one sequence, of which each thread takes a contiguous part: a block's result does
// not depend on who computes it.
template <Kind kKind>
void step(const Entry *entries, int64_t count, const Settings &s, const Book &signed_book, const Book &unsigned_book,
          int threads) {
    int64_t total = 0;
    for (int64_t e = 0; e < count; ++e) total += (entries[e].numel + s.block_size - 1) / s.block_size;
#pragma omp parallel num_threads(threads)
    {
        const int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
        const int64_t begin = total * me / team, end = total * (me + 1) / team;
        int64_t seen = 0;
        for (int64_t e = 0; e < count && seen < end; ++e) {
            const int64_t blocks = (entries[e].numel + s.block_size - 1) / s.block_size;
            const int64_t from = std::max<int64_t>(begin - seen, 0), to = std::min(end - seen, blocks);
            for (int64_t block = from; block < to; ++block)
                step_block<kKind>(entries[e], block, s, signed_book, unsigned_book);
            seen += blocks;
        }
    }
}

}  // namespace

extern "C" void tunesmith_adamw8bit_step(const Entry *entries, int64_t count, const Settings *settings,
                                         const Book *signed_book, const Book *unsigned_book, int32_t kind,
                                         int32_t threads) {
    switch (kind) {
        case kFp32: return step<kFp32>(entries, count, *settings, *signed_book, *unsigned_book, threads);
        case kBf16: return step<kBf16>(entries, count, *settings, *signed_book, *unsigned_book, threads);
        case kStochasticBf16:
            return step<kStochasticBf16>(entries, count, *settings, *signed_book, *unsigned_book, threads);
    }
}
