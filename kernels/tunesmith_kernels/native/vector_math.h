// exp and tanh in fp32 without branches, so that compilers vectorise them. After the Cephes library (Moshier), expf
// and tanhf: error below 2 ulp.
#pragma once

#include <cmath>

#include "bf16.h"

// exp(x) for x ≤ 0 (and NaN); 0 below −87.
static inline float exp_nonpositive(float x) {
    const float n = std::nearbyintf(x * 1.44269504088896341f);
    const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const float clamped = n < -126.0f ? -126.0f : n;
    const float value = p * bits_to_float(static_cast<uint32_t>(static_cast<int32_t>(clamped) + 127) << 23);
    return x < -87.0f ? 0.0f : value;
}

static inline float tanh_any(float x) {
    const float a = std::fabs(x);
    const float s = x * x;
    float p = -5.70498872745e-3f;
    p = p * s + 2.06390887954e-2f;
    p = p * s - 5.37397155531e-2f;
    p = p * s + 1.33314422036e-1f;
    p = p * s - 3.33332819422e-1f;
    const float small = p * s * x + x;
    const float e = exp_nonpositive(-2.0f * (a > 44.0f ? 44.0f : a));
    const float large = std::copysign(1.0f - 2.0f * e / (1.0f + e), x);
    return a < 0.625f ? small : large;
}
