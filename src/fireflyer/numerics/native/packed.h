/* The bytes of a packed matrix, as numerics/integer.py lays them out, and the kernels on them. Inside packed_*.c only. */
#ifndef FIREFLYER_PACKED_H
#define FIREFLYER_PACKED_H

#include <string.h>

#include "native.h"

#define INLINE static inline __attribute__((always_inline))

typedef struct {
    const uint8_t *codes;
    const float *scales;
    const uint8_t *groups;
    int rows, cols, kind;
    int64_t padded; /* inputs, to 64 */
} Packed;

INLINE Packed packed_of(const FFMatrix *w) {
    int64_t padded = (w->cols + 63) / 64 * 64, rows = (w->rows + 15) / 16 * 16;
    const uint8_t *codes = w->data, *scales = codes + rows * padded / (w->kind == KIND_INT8 ? 1 : 2);
    return (Packed){codes, (const float *)scales, scales + 4 * rows, w->rows, w->cols, w->kind, padded};
}

/* One strip of 16 outputs: its codes, scales and groups. */
typedef struct {
    const uint8_t *codes, *groups;
    const float *scales;
    int outputs; /* of the 16, so many are there */
} Strip;

INLINE Strip strip_of(const Packed *w, int64_t strip) {
    int64_t bytes = w->kind == KIND_INT8 ? 16 * w->padded : 8 * w->padded;
    int left = w->rows - (int)(strip * 16);
    return (Strip){w->codes + strip * bytes, w->groups + strip * (w->padded / 2), w->scales + strip * 16,
                   left < 16 ? left : 16};
}

/* Up to FEW rows of x by one strip, straight from the packed bytes; x begins with row `first`. */
#define FEW 4
typedef void (*FewRows)(const Packed *w, Strip strip, const FFRows *x, int first, int m, float *y, int64_t y_stride);
/* What is wanted next: fetched into the second cache little by little, so that memory and multiplications overlap. */
typedef struct {
    const uint8_t *at;
    int64_t bytes;
} Ahead;

/* `strips` (1 or 2) strips with codes of one byte, `bytes` apart, by all rows of x. */
typedef void (*ManyRows)(const uint8_t *codes, int64_t bytes, int strips, const Strip *strip, const FFRows *x, float *y,
                         int64_t y_stride, Ahead ahead);
/* A strip of int4 as the same strip of int8. */
typedef void (*Widen)(const Packed *w, Strip strip, uint8_t *codes);

typedef struct {
    FewRows few_int8, few_int4;
    ManyRows many; /* NULL: only few rows at a time */
    Widen widen;
} Kernels;

extern const Kernels ff_scalar_kernels;
#if defined(__x86_64__)
extern const Kernels ff_avx2_kernels, ff_vnni_kernels;
#if defined(__linux__) && defined(__has_include)
#if __has_include(<amxtileintrin.h>)
#define HAS_AMX 1
Kernels ff_amx_kernels(void);
#endif
#endif
#elif defined(__aarch64__)
extern const Kernels ff_neon_kernels;
#endif

#endif
