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

static constexpr int64_t LANES = 16;

// A sum (or a maximum) of floats in lanes, one vector register. Not OpenMP's `reduction`: GCC 12 vectorises it in most
// loops by adding the lanes up one after the other, which takes ten times as long, and rounds more.
struct Lanes {
    alignas(64) float at[LANES];

    explicit Lanes(float start = 0) { std::fill(at, at + LANES, start); }
    double sum() const {
        double total = 0;
        for (const float value : at) total += value;
        return total;
    }
    float max() const { return *std::max_element(at, at + LANES); }
};

// body(i, lane) for every i
template <class Body> static inline void in_lanes(int64_t begin, int64_t end, Body body) {
    int64_t i = begin;
    for (; i + LANES <= end; i += LANES) {
#pragma omp simd
        for (int64_t lane = 0; lane < LANES; ++lane) body(i + lane, lane);
    }
    for (int64_t lane = 0; i < end; ++i, ++lane) body(i, lane);
}

// z = cap·tanh(scale·x/cap) into scratch; ∂z/∂x into slope, where there is a cap. Returns how many are NaN.
template <class T>
static inline float transform(const T *x, float *z, float *slope, int64_t vocab, float softcap, float scale, float &top) {
    Lanes best(-std::numeric_limits<float>::infinity()), poison;
    const auto keep = [&](int64_t i, int64_t lane, float value) {
        z[i] = value;
        best.at[lane] = std::max(best.at[lane], value);
        poison.at[lane] += value != value ? 1.0f : 0.0f;
    };
    if (softcap == 0) {
        in_lanes(0, vocab, [&](int64_t i, int64_t lane) { keep(i, lane, load(x, i) * scale); });
    } else {
        const float inward = scale / softcap;
        in_lanes(0, vocab, [&](int64_t i, int64_t lane) {
            const float t = tanh_any(load(x, i) * inward);
            slope[i] = scale * (1.0f - t) * (1.0f + t);
            keep(i, lane, softcap * t);
        });
    }
    top = best.max();
    return static_cast<float>(poison.sum());
}
