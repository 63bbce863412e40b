/* y = x Wᵀ with packed int8 or int4 weights: activations quantised, strips shared out, the plain C kernels. */
#include <math.h>

#include "packed.h"

int64_t ff_rows_bytes(int64_t m, int cols) {
    int64_t stride = (cols + 63) / 64 * 64, tiles = (m + 15) / 16 * 16;
    return tiles * (stride + stride / 4 + 8) + 256;
}

FFRows ff_rows_in(void *memory, int64_t m, int cols) {
    int64_t stride = (cols + 63) / 64 * 64, tiles = (m + 15) / 16 * 16;
    int8_t *q = memory;
    int32_t *sums = (int32_t *)(q + tiles * stride), *totals = sums + tiles * (stride / 16);
    return (FFRows){q, sums, totals, (float *)(totals + tiles), stride, (int)m, cols};
}

/* Auto-vectorised for each level by inlining it there. Bit for bit what integer.py's quantize_rows does. */
INLINE void quantize_row(const float *x, int cols, int64_t padded, int8_t *q, int32_t *sums, int32_t *total,
                         float *scale) {
    int32_t largest_bits = 0; /* as integers magnitudes sort too, with NaN the largest of all */
    for (int k = 0; k < cols; k++) {
        int32_t bits;
        memcpy(&bits, x + k, 4);
        bits &= 0x7fffffff;
        largest_bits = bits > largest_bits ? bits : largest_bits;
    }
    float largest;
    memcpy(&largest, &largest_bits, 4);
    int usable = largest_bits < 0x7f800000 && largest >= 1e-35f;
    *scale = usable ? largest / 127 : largest_bits < 0x7f800000 ? 0 : NAN;
    if (!usable) memset(q, 0, (size_t)padded);
    else {
        float inverse = 127 / largest;
        for (int k = 0; k < cols; k++) {
            float rounded = rintf(x[k] * inverse);
            q[k] = (int8_t)(int32_t)(rounded > 127 ? 127 : rounded < -127 ? -127 : rounded);
        }
        memset(q + cols, 0, (size_t)(padded - cols));
    }
    int32_t all = 0;
    for (int64_t pair = 0; pair < padded / 64; pair++) {
        int32_t a = 0, b = 0;
        for (int k = 0; k < 32; k++) a += q[pair * 64 + k];
        for (int k = 32; k < 64; k++) b += q[pair * 64 + k];
        int32_t four[4] = {-8 * a, -128 * b, -a & 0xffff, -b & 0xffff};
        memcpy(sums + pair * 4, four, 16);
        all += a + b;
    }
    *total = -128 * all;
}

static void quantize_plain(const float *x, int cols, int64_t padded, int8_t *q, int32_t *sums, int32_t *total,
                           float *scale) {
    quantize_row(x, cols, padded, q, sums, total, scale);
}

#if defined(__x86_64__)
AVX2_LOOPS static void quantize_avx2(const float *x, int cols, int64_t padded, int8_t *q, int32_t *sums, int32_t *total,
                                     float *scale) {
    quantize_row(x, cols, padded, q, sums, total, scale);
}

AVX512_LOOPS static void quantize_avx512(const float *x, int cols, int64_t padded, int8_t *q, int32_t *sums,
                                         int32_t *total, float *scale) {
    quantize_row(x, cols, padded, q, sums, total, scale);
}
#endif

void ff_quantize(const FFRows *rows, const float *x, int64_t x_stride, int64_t begin, int64_t end) {
    void (*quantize)(const float *, int, int64_t, int8_t *, int32_t *, int32_t *, float *) = quantize_plain;
#if defined(__x86_64__)
    if (ff_level() >= LEVEL_AVX512) quantize = quantize_avx512;
    else if (ff_level() >= LEVEL_AVX2) quantize = quantize_avx2;
#endif
    for (int64_t i = begin; i < end; i++)
        quantize(x + i * x_stride, rows->cols, rows->stride, rows->q + i * rows->stride,
                 rows->sums + i * (rows->stride / 16), rows->totals + i, rows->scales + i);
}

static Kernels kernels(void) {
    int level = ff_level();
#if defined(__x86_64__)
#if defined(HAS_AMX)
    if (level >= LEVEL_AMX) return ff_amx_kernels();
#endif
    if (level >= LEVEL_VNNI) return ff_vnni_kernels;
    if (level >= LEVEL_AVX2) return ff_avx2_kernels;
#elif defined(__aarch64__)
    if (level >= LEVEL_NEON) return ff_neon_kernels;
#endif
    (void)level;
    return ff_scalar_kernels;
}

static void by_few_rows(const Packed *w, const FFRows *x, float *y, int64_t y_stride, int64_t begin, int64_t end,
                        FewRows few) {
    for (int64_t strip = begin; strip < end; strip++)
        for (int first = 0; first < x->m; first += FEW)
            few(w, strip_of(w, strip), x, first, x->m - first < FEW ? x->m - first : FEW,
                y + first * y_stride + strip * 16, y_stride);
}

static void by_many_rows(const Packed *w, const FFRows *x, float *y, int64_t y_stride, int64_t begin, int64_t end,
                         const Kernels *use) {
    int64_t bytes = 16 * w->padded;
    uint8_t *wide = w->kind == KIND_INT4 ? ff_scratch(0, 2 * bytes) : NULL;
    for (int64_t strip = begin; strip < end; strip += 2) {
        int strips = end - strip < 2 ? 1 : 2;
        Strip both[2] = {strip_of(w, strip), strip_of(w, strips == 2 ? strip + 1 : strip)};
        for (int s = 0; wide && s < strips; s++) use->widen(w, both[s], wide + s * bytes);
        int64_t next = end - strip - strips < 2 ? end - strip - strips : 2, own = wide ? bytes / 2 : bytes;
        Ahead ahead = {both[0].codes + strips * own, next * own};
        use->many(wide ? wide : both[0].codes, bytes, strips, both, x, y + strip * 16, y_stride, ahead);
    }
}

void ff_packed_strips(const FFMatrix *matrix, const FFRows *x, float *y, int64_t y_stride, int64_t begin, int64_t end) {
    Packed w = packed_of(matrix);
    Kernels use = kernels();
    /* int4 is read as it is a few times more before writing it out as int8 pays */
    if (use.many && x->m > (w.kind == KIND_INT8 ? FEW : 2 * FEW)) by_many_rows(&w, x, y, y_stride, begin, end, &use);
    else by_few_rows(&w, x, y, y_stride, begin, end, w.kind == KIND_INT8 ? use.few_int8 : use.few_int4);
}

static void finish(const int32_t *total, const Strip *strip, float x_scale, float *y) {
    for (int r = 0; r < strip->outputs; r++) y[r] = (float)total[r] * (x_scale * strip->scales[r]);
}

static void few_int8_scalar(const Packed *w, Strip strip, const FFRows *x, int first, int m, float *y,
                            int64_t y_stride) {
    for (int i = 0; i < m; i++) {
        const int8_t *q = x->q + (first + i) * x->stride;
        int32_t total[16] = {0};
        for (int64_t k = 0; k < w->padded; k += 4)
            for (int r = 0; r < 16; r++)
                for (int b = 0; b < 4; b++) total[r] += q[k + b] * (strip.codes[k * 16 + r * 4 + b] - 128);
        finish(total, &strip, x->scales[first + i], y + i * y_stride);
    }
}

static void few_int4_scalar(const Packed *w, Strip strip, const FFRows *x, int first, int m, float *y,
                            int64_t y_stride) {
    for (int i = 0; i < m; i++) {
        const int8_t *q = x->q + (first + i) * x->stride;
        int32_t total[16] = {0};
        for (int64_t group = 0; group < w->padded / 32; group++) {
            const uint8_t *codes = strip.codes + group / 2 * 512, *both = strip.groups + group * 16;
            int shift = group % 2 * 4;
            for (int r = 0; r < 16; r++) {
                int zero = 8 + ((int8_t)both[r] >> 4), sum = 0;
                for (int k = 0; k < 32; k++)
                    sum += q[group * 32 + k] * ((codes[k / 4 * 64 + r * 4 + k % 4] >> shift & 15) - zero);
                total[r] += sum * (both[r] & 15);
            }
        }
        finish(total, &strip, x->scales[first + i], y + i * y_stride);
    }
}

const Kernels ff_scalar_kernels = {few_int8_scalar, few_int4_scalar, NULL, NULL};
