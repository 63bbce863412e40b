/* ARM with dot products (every 64-bit ARM of Apple's, and most since 2018): a vector is four outputs of four inputs, and
 * sdot multiplies each by the same four inputs of x, which are one lane of it. */
#if defined(__aarch64__)
#include <arm_neon.h>

#include "packed.h"

#if defined(__clang__)
#define DOT __attribute__((target("dotprod")))
#else
#define DOT __attribute__((target("arch=armv8.2-a+dotprod")))
#endif

DOT INLINE void finish(const int32x4_t *total, Strip strip, float x_scale, float *y) {
    float all[16];
    for (int q = 0; q < 4; q++)
        vst1q_f32(all + 4 * q, vmulq_f32(vcvtq_f32_s32(total[q]), vmulq_n_f32(vld1q_f32(strip.scales + 4 * q), x_scale)));
    memcpy(y, all, 4 * (size_t)strip.outputs);
}

DOT INLINE void int8_rows(const Packed *w, Strip strip, const FFRows *x, int first, const int m, float *y,
                          int64_t y_stride) {
    const uint8x16_t offset = vdupq_n_u8(0x80);
    int32x4_t total[FEW][4];
    for (int i = 0; i < m; i++)
        for (int q = 0; q < 4; q++) total[i][q] = vdupq_n_s32(0);
    for (int64_t k = 0; k < w->padded; k += 4) {
        int8x16_t fours[FEW];
        for (int i = 0; i < m; i++) {
            int32_t four;
            memcpy(&four, x->q + (first + i) * x->stride + k, 4);
            fours[i] = vreinterpretq_s8_s32(vdupq_n_s32(four));
        }
        for (int q = 0; q < 4; q++) {
            uint8x16_t codes = vld1q_u8(strip.codes + k * 16 + q * 16);
            int8x16_t weights = vreinterpretq_s8_u8(veorq_u8(codes, offset));
            for (int i = 0; i < m; i++) total[i][q] = vdotq_s32(total[i][q], weights, fours[i]);
        }
    }
    for (int i = 0; i < m; i++) finish(total[i], strip, x->scales[first + i], y + i * y_stride);
}

DOT static void few_int8(const Packed *w, Strip strip, const FFRows *x, int first, int m, float *y, int64_t y_stride) {
    if (m == 1) int8_rows(w, strip, x, first, 1, y, y_stride);
    else if (m == 2) int8_rows(w, strip, x, first, 2, y, y_stride);
    else if (m == 3) int8_rows(w, strip, x, first, 3, y, y_stride);
    else int8_rows(w, strip, x, first, 4, y, y_stride);
}

/* Σ code · q of a pair of groups, for the four outputs of a quarter of the strip. */
DOT INLINE void sum_pair(const uint8_t *codes, const int8_t *q, int32x4_t *low_sum, int32x4_t *high_sum) {
    for (int j = 0; j < 8; j++) {
        int32_t a, b;
        memcpy(&a, q + j * 4, 4);
        memcpy(&b, q + 32 + j * 4, 4);
        uint8x16_t both = vld1q_u8(codes + j * 64);
        int8x16_t low = vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(15)));
        int8x16_t high = vreinterpretq_s8_u8(vshrq_n_u8(both, 4));
        *low_sum = vdotq_s32(*low_sum, low, vreinterpretq_s8_s32(vdupq_n_s32(a)));
        *high_sum = vdotq_s32(*high_sum, high, vreinterpretq_s8_s32(vdupq_n_s32(b)));
    }
}

/* (Σ code · q - zero · Σ q) · step, with -Σ q as `less`. */
DOT INLINE int32x4_t of_group(int32x4_t sum, const uint8_t *groups, int16_t less) {
    int32_t four;
    memcpy(&four, groups, 4);
    int16x8_t wide = vmovl_s8(vcreate_s8((uint32_t)four));
    int32x4_t both = vmovl_s16(vget_low_s16(wide));
    int32x4_t zero = vaddq_s32(vshrq_n_s32(both, 4), vdupq_n_s32(8));
    return vmulq_s32(vmlaq_n_s32(sum, zero, less), vandq_s32(both, vdupq_n_s32(15)));
}

DOT static void few_int4(const Packed *w, Strip strip, const FFRows *x, int first, int m, float *y, int64_t y_stride) {
    int32x4_t total[FEW][4];
    for (int i = 0; i < m; i++)
        for (int q = 0; q < 4; q++) total[i][q] = vdupq_n_s32(0);
    for (int64_t pair = 0; pair < w->padded / 64; pair++)
        for (int i = 0; i < m; i++) {
            const int32_t *sums = x->sums + (first + i) * (x->stride / 16) + pair * 4;
            for (int q = 0; q < 4; q++) {
                int32x4_t low = vdupq_n_s32(0), high = vdupq_n_s32(0);
                sum_pair(strip.codes + pair * 512 + q * 16, x->q + (first + i) * x->stride + pair * 64, &low, &high);
                const uint8_t *groups = strip.groups + pair * 32 + q * 4;
                total[i][q] = vaddq_s32(total[i][q], of_group(low, groups, (int16_t)sums[2]));
                total[i][q] = vaddq_s32(total[i][q], of_group(high, groups + 16, (int16_t)sums[3]));
            }
        }
    for (int i = 0; i < m; i++) finish(total[i], strip, x->scales[first + i], y + i * y_stride);
}

const Kernels ff_neon_kernels = {few_int8, few_int4, NULL, NULL};
#endif
