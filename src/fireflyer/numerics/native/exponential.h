#ifndef FIREFLYER_EXPONENTIAL_H
#define FIREFLYER_EXPONENTIAL_H

#include <math.h>
#include <stdint.h>
#include <string.h>

/* e^x to about an ulp, by the same operations for each number wherever it stands. */
static inline __attribute__((always_inline)) float exponential(float x) {
    x = x > 88 ? 88 : x < -87 ? -87 : x;
    float n = rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.98756915e-4f;
    p = p * r + 1.39819995e-3f;
    p = p * r + 8.33345197e-3f;
    p = p * r + 4.16657962e-2f;
    p = p * r + 0.166666657f;
    p = p * r + 0.5f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return (p * r * r + r + 1) * power;
}

#endif
