// What row kernels share: reading and writing a row of logits, sums, scale and soft-cap.
#pragma once

#include <algorithm>
#include <limits>

#include "bf16.h"
#include "vector_math.h"

static inline float load(const float *row, int64_t i) { return row[i]; }
static inline float load(const uint16_t *row, int64_t i) { return bf16_to_float(row[i]); }
static inline void store(float *row, int64_t i, float value) { row[i] = value; }
static inline void store(uint16_t *row, int64_t i, float value) { row[i] = float_to_bf16(value); }

// fp32 sums are closed after this many addends and gathered in fp64
static constexpr int64_t BLOCK = 1024;

template <class Body> static inline void in_blocks(int64_t begin, int64_t end, Body body) {
    for (int64_t start = begin; start < end; start += BLOCK) body(start, std::min(start + BLOCK, end));
}

// z = cap·tanh(scale·x/cap) into scratch; ∂z/∂x into slope, where there is a cap. Returns how many are NaN.
template <class T>
static inline float transform(const T *x, float *z, float *slope, int64_t vocab, float softcap, float scale, float &top) {
    float best = -std::numeric_limits<float>::infinity(), poison = 0;
    if (softcap == 0) {
#pragma omp simd reduction(max : best) reduction(+ : poison)
        for (int64_t i = 0; i < vocab; ++i) {
            const float value = load(x, i) * scale;
            z[i] = value;
            best = std::max(best, value);
            poison += value != value ? 1.0f : 0.0f;
        }
    } else {
        const float inward = scale / softcap;
#pragma omp simd reduction(max : best) reduction(+ : poison)
        for (int64_t i = 0; i < vocab; ++i) {
            const float t = tanh_any(load(x, i) * inward);
            const float value = softcap * t;
            z[i] = value;
            slope[i] = scale * (1.0f - t) * (1.0f + t);
            best = std::max(best, value);
            poison += value != value ? 1.0f : 0.0f;
        }
    }
    top = best;
    return poison;
}
