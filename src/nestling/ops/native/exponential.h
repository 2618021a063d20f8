// exp that the compiler can put into vector registers.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

inline double exponential(double x) { return std::exp(x); }

// 2^n p(r) with x = n ln 2 + r, |r| <= ln 2 / 2, and p the Taylor polynomial, whose remainder is
// below float32 rounding. NaN stays NaN.
inline float exponential(float x) {
    x = std::min(std::max(x, -87.0f), 88.0f);
    constexpr float round = 12582912.0f;  // 1.5 * 2^23: what is added below it is rounded to an integer
    const float n = (x * 1.44269504088896341f + round) - round;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * std::bit_cast<float>((static_cast<int32_t>(n) + 127) << 23);
}
