/* y = x Wᵀ with fp32 or bf16 weights as torch keeps them, row-major; x, sums and y are fp32.
 *
 * Few rows of x: the weights' way from memory is the whole cost, so four of W's rows run at a time as four streams, and
 * up to four rows of x share each weight read. More rows of x go over the same sixteen rows of W while a cache holds
 * them. Each product is summed in one order, whatever the number of rows and of threads. */
#include <string.h>

#include "native.h"

#define INLINE static inline __attribute__((always_inline))

typedef struct {
    const char *data; /* of the first row */
    int64_t row_bytes;
    int cols, kind;
} Rows;

static inline float weight_at(const char *row, int kind, int k) {
    if (kind == KIND_FP32) return ((const float *)row)[k];
    uint32_t bits = (uint32_t)((const uint16_t *)row)[k] << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* n rows of W by m rows of x, m and n up to 4 */
static void dot_scalar(Rows w, int n, const float *x, int64_t x_stride, int m, float *y, int64_t y_stride) {
    for (int i = 0; i < m; i++)
        for (int r = 0; r < n; r++) {
            const char *row = w.data + r * w.row_bytes;
            const float *at = x + i * x_stride;
            float lanes[16] = {0}; /* so that a compiler may use whatever vectors there are */
            int k = 0;
            for (; k + 16 <= w.cols; k += 16)
                for (int lane = 0; lane < 16; lane++) lanes[lane] += at[k + lane] * weight_at(row, w.kind, k + lane);
            for (int lane = 0; k < w.cols; k++, lane++) lanes[lane] += at[k] * weight_at(row, w.kind, k);
            for (int half = 8; half; half /= 2)
                for (int lane = 0; lane < half; lane++) lanes[lane] += lanes[lane + half];
            y[i * y_stride + r] = lanes[0];
        }
}

#if defined(__x86_64__)
#include <immintrin.h>

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#define AVX2 __attribute__((target("avx2,fma")))

AVX512 INLINE __m512 load_512(const char *row, int kind, int k, __mmask16 mask) {
    if (kind == KIND_FP32) return _mm512_maskz_loadu_ps(mask, row + (int64_t)k * 4);
    __m256i half = _mm256_maskz_loadu_epi16(mask, row + (int64_t)k * 2);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

/* Inlined with constant kind, n and m: each triple becomes a loop with its sums in registers. */
AVX512 INLINE void block_512(Rows w, const int kind, const int n, const float *x, int64_t x_stride, const int m,
                             float *y, int64_t y_stride) {
    __m512 sums[4][4];
    for (int i = 0; i < m; i++)
        for (int r = 0; r < n; r++) sums[i][r] = _mm512_setzero_ps();
    for (int k = 0; k < w.cols; k += 16) {
        __mmask16 mask = w.cols - k >= 16 ? 0xffff : (__mmask16)((1u << (w.cols - k)) - 1);
        __m512 xs[4];
        for (int i = 0; i < m; i++) xs[i] = _mm512_maskz_loadu_ps(mask, x + i * x_stride + k);
        for (int r = 0; r < n; r++) {
            const char *row = w.data + r * w.row_bytes;
            __m512 weight = load_512(row, kind, k, mask);
            _mm_prefetch(row + (int64_t)k * (kind == KIND_FP32 ? 4 : 2) + 1536, _MM_HINT_T0);
            for (int i = 0; i < m; i++) sums[i][r] = _mm512_fmadd_ps(weight, xs[i], sums[i][r]);
        }
    }
    for (int i = 0; i < m; i++)
        for (int r = 0; r < n; r++) y[i * y_stride + r] = _mm512_reduce_add_ps(sums[i][r]);
}

AVX512 INLINE void rows_512(Rows w, const int kind, const int n, const float *x, int64_t x_stride, int m, float *y,
                            int64_t y_stride) {
    if (m == 4) block_512(w, kind, n, x, x_stride, 4, y, y_stride);
    else if (m == 3) block_512(w, kind, n, x, x_stride, 3, y, y_stride);
    else if (m == 2) block_512(w, kind, n, x, x_stride, 2, y, y_stride);
    else block_512(w, kind, n, x, x_stride, 1, y, y_stride);
}

AVX512 static void dot_512(Rows w, int n, const float *x, int64_t x_stride, int m, float *y, int64_t y_stride) {
    if (n == 4 && w.kind == KIND_FP32) rows_512(w, KIND_FP32, 4, x, x_stride, m, y, y_stride);
    else if (n == 4) rows_512(w, KIND_BF16, 4, x, x_stride, m, y, y_stride);
    else
        for (int r = 0; r < n; r++) {
            Rows row = {w.data + r * w.row_bytes, w.row_bytes, w.cols, w.kind};
            if (w.kind == KIND_FP32) rows_512(row, KIND_FP32, 1, x, x_stride, m, y + r, y_stride);
            else rows_512(row, KIND_BF16, 1, x, x_stride, m, y + r, y_stride);
        }
}

AVX2 INLINE __m256 load_256(const char *row, int kind, int k) {
    if (kind == KIND_FP32) return _mm256_loadu_ps((const float *)row + k);
    __m128i half = _mm_loadu_si128((const __m128i *)((const uint16_t *)row + k));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

AVX2 INLINE float add_up_256(__m256 v) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

/* n rows of W by m rows of x, m up to 2: sixteen registers hold no more sums */
AVX2 INLINE void block_256(Rows w, const int kind, const int n, const float *x, int64_t x_stride, const int m, float *y,
                           int64_t y_stride) {
    __m256 sums[2][4];
    for (int i = 0; i < m; i++)
        for (int r = 0; r < n; r++) sums[i][r] = _mm256_setzero_ps();
    int k = 0;
    for (; k + 8 <= w.cols; k += 8) {
        __m256 xs[2];
        for (int i = 0; i < m; i++) xs[i] = _mm256_loadu_ps(x + i * x_stride + k);
        for (int r = 0; r < n; r++) {
            __m256 weight = load_256(w.data + r * w.row_bytes, kind, k);
            for (int i = 0; i < m; i++) sums[i][r] = _mm256_fmadd_ps(weight, xs[i], sums[i][r]);
        }
    }
    for (int i = 0; i < m; i++)
        for (int r = 0; r < n; r++) {
            float sum = add_up_256(sums[i][r]);
            for (int rest = k; rest < w.cols; rest++)
                sum += x[i * x_stride + rest] * weight_at(w.data + r * w.row_bytes, kind, rest);
            y[i * y_stride + r] = sum;
        }
}

AVX2 INLINE void rows_256(Rows w, const int kind, const int n, const float *x, int64_t x_stride, int m, float *y,
                          int64_t y_stride) {
    int i = 0;
    for (; i + 2 <= m; i += 2) block_256(w, kind, n, x + i * x_stride, x_stride, 2, y + i * y_stride, y_stride);
    if (i < m) block_256(w, kind, n, x + i * x_stride, x_stride, 1, y + i * y_stride, y_stride);
}

AVX2 static void dot_256(Rows w, int n, const float *x, int64_t x_stride, int m, float *y, int64_t y_stride) {
    if (n == 4 && w.kind == KIND_FP32) rows_256(w, KIND_FP32, 4, x, x_stride, m, y, y_stride);
    else if (n == 4) rows_256(w, KIND_BF16, 4, x, x_stride, m, y, y_stride);
    else
        for (int r = 0; r < n; r++) {
            Rows row = {w.data + r * w.row_bytes, w.row_bytes, w.cols, w.kind};
            if (w.kind == KIND_FP32) rows_256(row, KIND_FP32, 1, x, x_stride, m, y + r, y_stride);
            else rows_256(row, KIND_BF16, 1, x, x_stride, m, y + r, y_stride);
        }
}
#endif

void ff_float_rows(const FFMatrix *w, const float *x, int64_t x_stride, int m, float *y, int64_t y_stride,
                   int64_t begin, int64_t end) {
    void (*dot)(Rows, int, const float *, int64_t, int, float *, int64_t) = dot_scalar;
#if defined(__x86_64__)
    if (ff_level() >= LEVEL_AVX512) dot = dot_512;
    else if (ff_level() >= LEVEL_AVX2) dot = dot_256;
#endif
    int64_t row_bytes = w->stride * (w->kind == KIND_FP32 ? 4 : 2);
    for (int64_t strip = begin; strip < end; strip += 16)
        for (int i = 0; i < m; i += 4)
            for (int64_t r = strip; r < end && r < strip + 16; r += 4) {
                Rows rows = {(const char *)w->data + r * row_bytes, row_bytes, w->cols, w->kind};
                dot(rows, end - r < 4 ? (int)(end - r) : 4, x + i * x_stride, x_stride, m - i < 4 ? m - i : 4,
                    y + i * y_stride + r, y_stride);
            }
}
