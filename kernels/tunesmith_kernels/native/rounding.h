// Stochastic rounding of float to bfloat16; the definition, with its sources, is in adamw/rounding.py.
#pragma once

#include <cstdint>

#include "bf16.h"

static inline uint32_t mix32(uint32_t x) {
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    x ^= x >> 16;
    return x;
}

// The key of one update of one parameter; `step` is the number of the update being made, from 1.
static inline uint32_t rounding_key(uint64_t seed, uint32_t step, uint32_t stream) {
    uint32_t key = mix32(static_cast<uint32_t>(seed) ^ 0x9e3779b9u);
    key = mix32(key ^ static_cast<uint32_t>(seed >> 32));
    key = mix32(key ^ step);
    return mix32(key ^ stream);
}

// The key of the elements whose global index has these upper 32 bits.
static inline uint32_t rounding_key_of_high(uint32_t key, uint32_t high) { return mix32(key ^ high); }

// Two random words for the element whose global index has these lower 32 bits.
static inline uint32_t first_draw(uint32_t low, uint32_t key) { return mix32(mix32(low + key) ^ key); }
static inline uint32_t second_draw(uint32_t first, uint32_t key) { return mix32(first ^ 0x85ebca6bu ^ key); }

// The bits of `value` with its upper half rounded, `draw` being below 2^16; the lower half is left over. Without
// branches, so that compilers vectorise it: from the largest bfloat16 on nothing is added, so that a finite value never
// becomes infinite and an infinite one or a NaN stays. A NaN must be a quiet one, as all results of arithmetic are.
static inline uint32_t round_stochastically(float value, uint32_t draw) {
    const uint32_t bits = float_to_bits(value);
    return bits + ((bits & 0x7fffffffu) < 0x7f7f0000u ? draw : 0u);
}
