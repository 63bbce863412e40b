/* Many rows of x on AMX: a strip's codes of 64 inputs are one tile of 16 × 64 bytes as they lie. */
#include "packed.h"

#if defined(HAS_AMX)
#include <immintrin.h>

#define AMX __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,amx-tile,amx-int8")))

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} TileShapes;

AMX static void shape_tiles(void) {
    TileShapes shapes = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) shapes.row_bytes[tile] = 64, shapes.rows[tile] = 16;
    _tile_loadconfig(&shapes);
}

/* The 16 × 16 sums of a tile, of which `m` rows are wanted. */
AMX INLINE void finish(const int32_t *sums, Strip strip, const FFRows *x, int first, int m, float *y, int64_t y_stride) {
    __mmask16 there = (__mmask16)((1u << strip.outputs) - 1);
    __m512 scales = _mm512_loadu_ps(strip.scales);
    for (int i = 0; i < m; i++) {
        __m512i total = _mm512_add_epi32(_mm512_load_si512(sums + i * 16), _mm512_set1_epi32(x->totals[first + i]));
        __m512 scale = _mm512_mul_ps(_mm512_set1_ps(x->scales[first + i]), scales);
        _mm512_mask_storeu_ps(y + i * y_stride, there, _mm512_mul_ps(_mm512_cvtepi32_ps(total), scale));
    }
}

/* The next 1 / steps of what is ahead. */
AMX INLINE void fetch(Ahead *ahead, int64_t steps) {
    int64_t bytes = ahead->bytes / steps;
    for (int64_t at = 0; at < bytes; at += 64) _mm_prefetch((const char *)ahead->at + at, _MM_HINT_T1);
    ahead->at += bytes, ahead->bytes -= bytes;
}

/* Tiles 0..3 are the sums, 4 and 5 the rows of x, 6 and 7 the strips; x has whole tiles of rows. */
AMX static void block_32(const uint8_t *codes, int64_t bytes, const Strip *strip, const FFRows *x, int first, float *y,
                         int64_t y_stride, Ahead ahead) {
    int32_t sums[256] __attribute__((aligned(64)));
    const int8_t *q = x->q + first * x->stride;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < x->stride; k += 64) {
        fetch(&ahead, (x->stride - k) / 64);
        _tile_loadd(6, codes + k * 16, 64);
        _tile_loadd(4, q + k, x->stride);
        _tile_dpbsud(0, 4, 6);
        _tile_loadd(7, codes + bytes + k * 16, 64);
        _tile_dpbsud(1, 4, 7);
        _tile_loadd(5, q + 16 * x->stride + k, x->stride);
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
    }
    int below = x->m - first - 16;
    float *at = y + first * y_stride;
    _tile_stored(0, sums, 64);
    finish(sums, strip[0], x, first, 16, at, y_stride);
    _tile_stored(1, sums, 64);
    finish(sums, strip[1], x, first, 16, at + 16, y_stride);
    _tile_stored(2, sums, 64);
    finish(sums, strip[0], x, first + 16, below < 16 ? below : 16, at + 16 * y_stride, y_stride);
    _tile_stored(3, sums, 64);
    finish(sums, strip[1], x, first + 16, below < 16 ? below : 16, at + 16 * y_stride + 16, y_stride);
}

AMX static void block_16(const uint8_t *codes, int64_t bytes, int strips, const Strip *strip, const FFRows *x, int first,
                         float *y, int64_t y_stride) {
    int32_t sums[256] __attribute__((aligned(64)));
    const int8_t *q = x->q + first * x->stride;
    int m = x->m - first < 16 ? x->m - first : 16;
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t k = 0; k < x->stride; k += 64) {
        _tile_loadd(4, q + k, x->stride);
        _tile_loadd(6, codes + k * 16, 64);
        _tile_dpbsud(0, 4, 6);
        if (strips == 2) {
            _tile_loadd(7, codes + bytes + k * 16, 64);
            _tile_dpbsud(1, 4, 7);
        }
    }
    _tile_stored(0, sums, 64);
    finish(sums, strip[0], x, first, m, y + first * y_stride, y_stride);
    if (strips == 2) {
        _tile_stored(1, sums, 64);
        finish(sums, strip[1], x, first, m, y + first * y_stride + 16, y_stride);
    }
}

AMX static void many(const uint8_t *codes, int64_t bytes, int strips, const Strip *strip, const FFRows *x, float *y,
                     int64_t y_stride, Ahead ahead) {
    shape_tiles(); /* for each pair of strips: whoever else uses tiles on this thread shapes them anew as well */
    int first = 0;
    for (; strips == 2 && x->m - first > 16; first += 32) {
        Ahead part = {ahead.at, ahead.bytes * 32 / (x->m - first < 32 ? 32 : x->m - first)};
        block_32(codes, bytes, strip, x, first, y, y_stride, part);
        ahead.at += part.bytes, ahead.bytes -= part.bytes;
    }
    for (; first < x->m; first += 16) block_16(codes, bytes, strips, strip, x, first, y, y_stride);
    _tile_release();
}

Kernels ff_amx_kernels(void) {
    Kernels vnni = ff_vnni_kernels;
    vnni.many = many;
    return vnni;
}
#endif
