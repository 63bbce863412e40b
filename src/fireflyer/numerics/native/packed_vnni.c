/* AVX-512 with VNNI: 16 outputs are the 16 lanes, so four inputs of a row of x are broadcast and nothing is summed across
 * lanes. vpdpbusd multiplies unsigned by signed: weights are stored with an offset, which the sums of x take off again.
 *
 * int4 stays in integers to the end: Σ (code - 8) · q of a group fits 16 bits, so vpdpwssd multiplies it by the group's
 * step and adds it to the total in one instruction; the high halves, used where they lie, count 16 times. */
#if defined(__x86_64__)
#include <immintrin.h>

#include "packed.h"

#define VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
#define BLOCK 8 /* rows of x by two strips: with 12, which the registers would hold, it takes 1.6 times as long */

VNNI INLINE __m512i four_inputs(const int8_t *q) {
    int32_t four;
    memcpy(&four, q, 4);
    return _mm512_set1_epi32(four);
}

VNNI INLINE void finish(__m512i total, Strip strip, float x_scale, float *y) {
    __m512 scale = _mm512_mul_ps(_mm512_set1_ps(x_scale), _mm512_loadu_ps(strip.scales));
    __mmask16 there = (__mmask16)((1u << strip.outputs) - 1);
    _mm512_mask_storeu_ps(y, there, _mm512_mul_ps(_mm512_cvtepi32_ps(total), scale));
}

VNNI INLINE void int8_rows(const Packed *w, Strip strip, const FFRows *x, int first, const int m, float *y,
                           int64_t y_stride) {
    const int chains = m == 1 ? 4 : 2; /* sums that do not wait for one another */
    __m512i sums[FEW][4];
    for (int i = 0; i < m; i++)
        for (int c = 0; c < chains; c++) sums[i][c] = _mm512_set1_epi32(c ? 0 : x->totals[first + i]);
    const int8_t *q = x->q + first * x->stride;
    for (int64_t k = 0; k < w->padded; k += 4 * chains) {
        for (int c = 0; c < chains; c++) {
            const uint8_t *at = strip.codes + k * 16 + c * 64;
            _mm_prefetch((const char *)at + 4096, _MM_HINT_T0);
            __m512i codes = _mm512_loadu_si512(at);
            for (int i = 0; i < m; i++)
                sums[i][c] = _mm512_dpbusd_epi32(sums[i][c], codes, four_inputs(q + i * x->stride + k + c * 4));
        }
    }
    for (int i = 0; i < m; i++) {
        __m512i total = _mm512_add_epi32(sums[i][0], sums[i][1]);
        if (chains == 4) total = _mm512_add_epi32(total, _mm512_add_epi32(sums[i][2], sums[i][3]));
        finish(total, strip, x->scales[first + i], y + i * y_stride);
    }
}

VNNI static void few_int8(const Packed *w, Strip strip, const FFRows *x, int first, int m, float *y, int64_t y_stride) {
    if (m == 1) int8_rows(w, strip, x, first, 1, y, y_stride);
    else if (m == 2) int8_rows(w, strip, x, first, 2, y, y_stride);
    else if (m == 3) int8_rows(w, strip, x, first, 3, y, y_stride);
    else int8_rows(w, strip, x, first, 4, y, y_stride);
}

VNNI INLINE void int4_rows(const Packed *w, Strip strip, const FFRows *x, int first, const int m, float *y,
                           int64_t y_stride) {
    const __m512i low_half = _mm512_set1_epi8(0x0f), high_half = _mm512_set1_epi8((char)0xf0);
    const __m512i low_of_32 = _mm512_set1_epi32(15);
    __m512i totals[FEW];
    for (int i = 0; i < m; i++) totals[i] = _mm512_setzero_si512();
    const int8_t *q = x->q + first * x->stride;
    const int32_t *sums = x->sums + first * (x->stride / 16);
    for (int64_t pair = 0; pair < w->padded / 64; pair++) {
        const uint8_t *codes = strip.codes + pair * 512;
        __m512i a[FEW], b[FEW];
        for (int i = 0; i < m; i++) {
            a[i] = _mm512_set1_epi32(sums[i * (x->stride / 16) + pair * 4]);
            b[i] = _mm512_set1_epi32(sums[i * (x->stride / 16) + pair * 4 + 1]);
        }
        for (int j = 0; j < 8; j++) {
            _mm_prefetch((const char *)codes + j * 64 + 3072, _MM_HINT_T0);
            __m512i both = _mm512_loadu_si512(codes + j * 64);
            __m512i low = _mm512_and_si512(both, low_half), high = _mm512_and_si512(both, high_half);
            for (int i = 0; i < m; i++) {
                const int8_t *at = q + i * x->stride + pair * 64 + j * 4;
                a[i] = _mm512_dpbusd_epi32(a[i], low, four_inputs(at));
                b[i] = _mm512_dpbusd_epi32(b[i], high, four_inputs(at + 32));
            }
        }
        const __m128i *groups = (const __m128i *)(strip.groups + pair * 32);
        __m512i a_both = _mm512_cvtepi8_epi32(_mm_loadu_si128(groups));
        __m512i b_both = _mm512_cvtepi8_epi32(_mm_loadu_si128(groups + 1));
        __m512i a_step = _mm512_and_si512(a_both, low_of_32), b_step = _mm512_and_si512(b_both, low_of_32);
        __m512i a_zero = _mm512_mullo_epi16(_mm512_srai_epi32(a_both, 4), a_step);
        __m512i b_zero = _mm512_mullo_epi16(_mm512_srai_epi32(b_both, 4), b_step);
        for (int i = 0; i < m; i++) {
            const int32_t *own = sums + i * (x->stride / 16) + pair * 4;
            __m512i total = _mm512_dpwssd_epi32(totals[i], a_step, a[i]);
            total = _mm512_dpwssd_epi32(total, a_zero, _mm512_set1_epi32(own[2]));
            total = _mm512_dpwssd_epi32(total, b_step, _mm512_srai_epi32(b[i], 4));
            totals[i] = _mm512_dpwssd_epi32(total, b_zero, _mm512_set1_epi32(own[3]));
        }
    }
    for (int i = 0; i < m; i++) finish(totals[i], strip, x->scales[first + i], y + i * y_stride);
}

VNNI static void few_int4(const Packed *w, Strip strip, const FFRows *x, int first, int m, float *y, int64_t y_stride) {
    if (m == 1) int4_rows(w, strip, x, first, 1, y, y_stride);
    else if (m == 2) int4_rows(w, strip, x, first, 2, y, y_stride);
    else if (m == 3) int4_rows(w, strip, x, first, 3, y, y_stride);
    else int4_rows(w, strip, x, first, 4, y, y_stride);
}

VNNI INLINE void many_block(const uint8_t *codes, int64_t bytes, const int strips, const Strip *strip, const FFRows *x,
                            int first, const int m, float *y, int64_t y_stride, Ahead ahead) {
    const int64_t steps = x->stride / 4, ahead_step = ahead.bytes < 64 * steps ? ahead.bytes / steps : 64;
    __m512i sums[BLOCK][2];
    for (int i = 0; i < m; i++)
        for (int s = 0; s < strips; s++) sums[i][s] = _mm512_set1_epi32(x->totals[first + i]);
    const int8_t *q = x->q + first * x->stride;
    for (int64_t k = 0; k < x->stride; k += 4) {
        __m512i weights[2];
        for (int s = 0; s < strips; s++) weights[s] = _mm512_loadu_si512(codes + s * bytes + k * 16);
        _mm_prefetch((const char *)ahead.at, _MM_HINT_T1);
        ahead.at += ahead_step;
        for (int i = 0; i < m; i++) {
            __m512i four = four_inputs(q + i * x->stride + k);
            for (int s = 0; s < strips; s++) sums[i][s] = _mm512_dpbusd_epi32(sums[i][s], weights[s], four);
        }
    }
    for (int i = 0; i < m; i++)
        for (int s = 0; s < strips; s++)
            finish(sums[i][s], strip[s], x->scales[first + i], y + (first + i) * y_stride + s * 16);
}

#define CASE(n)                                                                                                       \
    case n:                                                                                                           \
        if (strips == 2) many_block(codes, bytes, 2, strip, x, first, n, y, y_stride, part);                          \
        else many_block(codes, bytes, 1, strip, x, first, n, y, y_stride, part);                                      \
        break;

VNNI static void many(const uint8_t *codes, int64_t bytes, int strips, const Strip *strip, const FFRows *x, float *y,
                      int64_t y_stride, Ahead ahead) {
    int blocks = (x->m + BLOCK - 1) / BLOCK;
    for (int block = 0; block < blocks; block++) {
        int first = x->m * block / blocks, end = x->m * (block + 1) / blocks;
        Ahead part = {ahead.at + ahead.bytes * block / blocks, ahead.bytes / blocks};
        switch (end - first) {
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
        }
    }
}

/* Bytes times bytes: as 16-bit products of the even and of the odd bytes, whose low halves are what is wanted. */
VNNI INLINE __m512i multiply_bytes(__m512i codes, __m512i step, __m512i offset) {
    __m512i even = _mm512_mullo_epi16(_mm512_and_si512(codes, _mm512_set1_epi16(0xff)), step);
    __m512i odd = _mm512_slli_epi16(_mm512_mullo_epi16(_mm512_srli_epi16(codes, 8), step), 8);
    return _mm512_add_epi8(_mm512_or_si512(even, odd), offset);
}

/* A group's step as 16-bit pairs, and 128 - step · zero in each byte. */
VNNI INLINE void step_and_offset(const uint8_t *groups, __m512i *step, __m512i *offset) {
    __m512i both = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)groups));
    __m512i low = _mm512_and_si512(both, _mm512_set1_epi32(15));
    __m512i zero = _mm512_add_epi32(_mm512_srai_epi32(both, 4), _mm512_set1_epi32(8));
    __m512i byte = _mm512_sub_epi32(_mm512_set1_epi32(128), _mm512_mullo_epi16(low, zero));
    byte = _mm512_and_si512(byte, _mm512_set1_epi32(255));
    byte = _mm512_or_si512(byte, _mm512_slli_epi32(byte, 8));
    *offset = _mm512_or_si512(byte, _mm512_slli_epi32(byte, 16));
    *step = _mm512_or_si512(low, _mm512_slli_epi32(low, 16));
}

VNNI static void widen(const Packed *w, Strip strip, uint8_t *out) {
    const __m512i low_half = _mm512_set1_epi8(0x0f);
    for (int64_t pair = 0; pair < w->padded / 64; pair++) {
        __m512i a_step, a_offset, b_step, b_offset;
        step_and_offset(strip.groups + pair * 32, &a_step, &a_offset);
        step_and_offset(strip.groups + pair * 32 + 16, &b_step, &b_offset);
        for (int j = 0; j < 8; j++) {
            _mm_prefetch((const char *)strip.codes + pair * 512 + j * 64 + 2048, _MM_HINT_T0);
            __m512i both = _mm512_loadu_si512(strip.codes + pair * 512 + j * 64);
            __m512i low = _mm512_and_si512(both, low_half);
            __m512i high = _mm512_and_si512(_mm512_srli_epi16(both, 4), low_half);
            _mm512_store_si512(out + pair * 1024 + j * 64, multiply_bytes(low, a_step, a_offset));
            _mm512_store_si512(out + pair * 1024 + 512 + j * 64, multiply_bytes(high, b_step, b_offset));
        }
    }
}

const Kernels ff_vnni_kernels = {few_int8, few_int4, many, widen};
#endif
