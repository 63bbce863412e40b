/* AVX2: 16 outputs are two vectors of 8 lanes. vpmaddubsw's sums of two products must fit 16 bits: for int8 it is given
 * |weight| and x with the weight's sign (127 · 127 · 2 < 2^15), for int4 a group's eight sums fit (15 · 127 · 2 · 8). */
#if defined(__x86_64__)
#include <immintrin.h>

#include "packed.h"

#define AVX2 __attribute__((target("avx2")))

AVX2 INLINE __m256i four_inputs(const int8_t *q) {
    int32_t four;
    memcpy(&four, q, 4);
    return _mm256_set1_epi32(four);
}

AVX2 INLINE void finish(const __m256i *total, Strip strip, float x_scale, float *y) {
    float all[16];
    for (int h = 0; h < 2; h++) {
        __m256 scale = _mm256_mul_ps(_mm256_set1_ps(x_scale), _mm256_loadu_ps(strip.scales + 8 * h));
        _mm256_storeu_ps(all + 8 * h, _mm256_mul_ps(_mm256_cvtepi32_ps(total[h]), scale));
    }
    memcpy(y, all, 4 * (size_t)strip.outputs);
}

AVX2 static void few_int8(const Packed *w, Strip strip, const FFRows *x, int first, int m, float *y, int64_t y_stride) {
    const __m256i offset = _mm256_set1_epi8((char)0x80), ones = _mm256_set1_epi16(1);
    __m256i total[FEW][2];
    for (int i = 0; i < m; i++) total[i][0] = total[i][1] = _mm256_setzero_si256();
    const int8_t *q = x->q + first * x->stride;
    for (int64_t k = 0; k < w->padded; k += 4)
        for (int h = 0; h < 2; h++) {
            __m256i codes = _mm256_loadu_si256((const __m256i *)(strip.codes + k * 16 + h * 32));
            __m256i weights = _mm256_xor_si256(codes, offset), size = _mm256_abs_epi8(weights);
            for (int i = 0; i < m; i++) {
                __m256i signs = _mm256_sign_epi8(four_inputs(q + i * x->stride + k), weights);
                __m256i four = _mm256_madd_epi16(_mm256_maddubs_epi16(size, signs), ones);
                total[i][h] = _mm256_add_epi32(total[i][h], four);
            }
        }
    for (int i = 0; i < m; i++) finish(total[i], strip, x->scales[first + i], y + i * y_stride);
}

AVX2 static void few_int4(const Packed *w, Strip strip, const FFRows *x, int first, int m, float *y, int64_t y_stride) {
    const __m256i low_half = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    __m256i total[FEW][2];
    for (int i = 0; i < m; i++) total[i][0] = total[i][1] = _mm256_setzero_si256();
    for (int64_t group = 0; group < w->padded / 32; group++)
        for (int h = 0; h < 2; h++) {
            const uint8_t *codes = strip.codes + group / 2 * 512 + h * 32;
            __m256i sum[FEW];
            for (int i = 0; i < m; i++) sum[i] = _mm256_setzero_si256();
            for (int j = 0; j < 8; j++) {
                __m256i both = _mm256_loadu_si256((const __m256i *)(codes + j * 64));
                __m256i code = _mm256_and_si256(group % 2 ? _mm256_srli_epi16(both, 4) : both, low_half);
                for (int i = 0; i < m; i++) {
                    const int8_t *q = x->q + (first + i) * x->stride + group * 32 + j * 4;
                    sum[i] = _mm256_add_epi16(sum[i], _mm256_maddubs_epi16(code, four_inputs(q)));
                }
            }
            const uint8_t *groups = strip.groups + group * 16 + h * 8;
            __m256i step_zero = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)groups));
            __m256i step = _mm256_and_si256(step_zero, _mm256_set1_epi32(15));
            __m256i zero = _mm256_add_epi32(_mm256_srai_epi32(step_zero, 4), _mm256_set1_epi32(8));
            for (int i = 0; i < m; i++) {
                int16_t less = (int16_t)x->sums[(first + i) * (x->stride / 16) + group / 2 * 4 + 2 + group % 2];
                __m256i offset = _mm256_mullo_epi32(zero, _mm256_set1_epi32(less));
                __m256i centred = _mm256_add_epi32(_mm256_madd_epi16(sum[i], ones), offset);
                total[i][h] = _mm256_add_epi32(total[i][h], _mm256_mullo_epi32(centred, step));
            }
        }
    for (int i = 0; i < m; i++) finish(total[i], strip, x->scales[first + i], y + i * y_stride);
}

const Kernels ff_avx2_kernels = {few_int8, few_int4, NULL, NULL};
#endif
