/* A layer's routed experts in one region: x quantised once a token, every chosen expert's gate, up and down, the sum.
 *
 * Rows are laid out by expert, so that each expert's weights are read once however many tokens chose it. Work is cut
 * into pieces of some strips of one expert, which free threads take: which thread does a piece changes nothing. The
 * sum goes over a token's choices in their order, so neither the other tokens nor the order of experts matter. */
#include <math.h>
#include <string.h>

#include "exponential.h"
#include "native.h"

#define PIECE 16 /* strips of 16 outputs in one piece of work */

static int is_packed(const FFExperts *of) { return of->kind == KIND_INT8 || of->kind == KIND_INT4; }

static FFMatrix matrix_of(const FFExperts *of, int expert, int part) {
    int rows = part == 2 ? of->hidden : of->width, cols = part == 2 ? of->width : of->hidden;
    return (FFMatrix){of->table[3 * expert + part], cols, rows, cols, of->kind};
}

void ff_experts_begin(FFExpertsCall *call) {
    const FFExperts *of = &call->of;
    int64_t pairs = (int64_t)call->tokens * call->top_k;
    int64_t wide = (pairs * of->width * 4 + 63) / 64 * 64, lists = (4 * (of->experts + 1 + pairs) + 63) / 64 * 64;
    int64_t x_bytes = is_packed(of) ? ff_rows_bytes(pairs + 16, of->hidden) : pairs * of->hidden * 4;
    int64_t wide_bytes = is_packed(of) ? ff_rows_bytes(pairs + 16, of->width) : 0;
    char *memory = ff_scratch(2, lists + wide + x_bytes + 64 + wide_bytes);
    call->starts = (int32_t *)memory;
    call->row_of = call->starts + of->experts + 1;
    call->wide = (float *)(memory + lists);
    char *x_memory = memory + lists + wide;
    if (is_packed(of)) {
        call->x_rows = ff_rows_in(x_memory, pairs + 16, of->hidden);
        call->wide_rows = ff_rows_in(x_memory + (x_bytes + 63) / 64 * 64, pairs + 16, of->width);
    } else call->gathered = (float *)x_memory;
    call->given = call->rows ? call->rows : ff_scratch(3, pairs * of->hidden * 4);
    memset(call->starts, 0, 4 * (size_t)(of->experts + 1));
    for (int64_t i = 0; i < pairs; i++) call->starts[call->indices[i] + 1]++;
    for (int e = 0; e < of->experts; e++) call->starts[e + 1] += call->starts[e];
    for (int64_t i = 0; i < pairs; i++) call->row_of[i] = call->starts[call->indices[i]]++;
    memmove(call->starts + 1, call->starts, 4 * (size_t)of->experts); /* each has moved to its end: the next one's start */
    call->starts[0] = 0;
    call->next[0] = call->next[1] = 0;
}

static FFRows rows_from(const FFRows *rows, int64_t start, int m) {
    return (FFRows){rows->q + start * rows->stride, rows->sums + start * (rows->stride / 16), rows->totals + start,
                    rows->scales + start, rows->stride, m, rows->cols};
}

/* This thread's tokens, quantised into the first of their rows and copied into the others. */
static void lay_out_x(FFExpertsCall *call, const FFTeam *team) {
    int64_t begin, end;
    ff_share(team, call->tokens, 1, &begin, &end);
    const FFRows *to = &call->x_rows;
    for (int64_t n = begin; n < end; n++) {
        const float *x = call->x + n * call->x_stride;
        int64_t from = -1;
        for (int k = 0; k < call->top_k; k++) {
            int64_t row = call->row_of[n * call->top_k + k];
            if (!call->of.table[3 * call->indices[n * call->top_k + k]]) continue;
            if (!is_packed(&call->of)) {
                memcpy(call->gathered + row * call->of.hidden, x, 4 * (size_t)call->of.hidden);
            } else if (from < 0) {
                FFRows one = rows_from(to, row, 1);
                ff_quantize(&one, x, 0, 0, 1);
                from = row;
            } else {
                memcpy(to->q + row * to->stride, to->q + from * to->stride, (size_t)to->stride);
                memcpy(to->sums + row * (to->stride / 16), to->sums + from * (to->stride / 16), to->stride / 4);
                to->totals[row] = to->totals[from];
                to->scales[row] = to->scales[from];
            }
        }
    }
}

static inline __attribute__((always_inline)) void swiglu_body(const float *gate, const float *up, float *out, int count) {
    for (int i = 0; i < count; i++) out[i] = gate[i] / (1 + exponential(-gate[i])) * up[i];
}

static void swiglu_plain(const float *gate, const float *up, float *out, int count) {
    swiglu_body(gate, up, out, count);
}

#if defined(__x86_64__)
AVX2_LOOPS static void swiglu_avx2(const float *gate, const float *up, float *out, int count) {
    swiglu_body(gate, up, out, count);
}

AVX512_LOOPS static void swiglu_avx512(const float *gate, const float *up, float *out, int count) {
    swiglu_body(gate, up, out, count);
}
#endif

static void swiglu(const float *gate, const float *up, float *out, int count) {
#if defined(__x86_64__)
    if (ff_level() >= LEVEL_AVX512) swiglu_avx512(gate, up, out, count);
    else if (ff_level() >= LEVEL_AVX2) swiglu_avx2(gate, up, out, count);
    else
#endif
        swiglu_plain(gate, up, out, count);
}

/* The strips [begin, end) of one matrix for the rows of its expert. */
static void strips(const FFExpertsCall *call, const FFMatrix *w, int start, int m, int64_t begin, int64_t end, int part,
                   float *y, int64_t y_stride) {
    const FFRows *packed = part == 2 ? &call->wide_rows : &call->x_rows;
    if (is_packed(&call->of)) {
        FFRows rows = rows_from(packed, start, m);
        ff_packed_strips(w, &rows, y, y_stride, begin, end);
        return;
    }
    const float *x = (part == 2 ? call->wide : call->gathered) + (int64_t)start * w->cols;
    ff_float_rows(w, x, w->cols, m, y, y_stride, begin * 16, end * 16 < w->rows ? end * 16 : w->rows);
}

static void gate_and_up(const FFExpertsCall *call, int expert, int start, int m, int64_t begin, int64_t end) {
    const FFExperts *of = &call->of;
    FFMatrix gate = matrix_of(of, expert, 0), up = matrix_of(of, expert, 1);
    float *both = ff_scratch(1, (int64_t)2 * m * PIECE * 16 * 4);
    float *ups = both + (int64_t)m * PIECE * 16;
    memset(both, 0, (size_t)2 * m * PIECE * 16 * 4); /* so that a strip that is not full has numbers everywhere */
    strips(call, &gate, start, m, begin, end, 0, both - begin * 16, PIECE * 16);
    strips(call, &up, start, m, begin, end, 1, ups - begin * 16, PIECE * 16);
    int64_t left = of->width - begin * 16, count = (end - begin) * 16 < left ? (end - begin) * 16 : left;
    for (int i = 0; i < m; i++) {
        swiglu(both + i * PIECE * 16, ups + i * PIECE * 16, both + i * PIECE * 16, PIECE * 16);
        memcpy(call->wide + (start + i) * (int64_t)of->width + begin * 16, both + i * PIECE * 16, 4 * (size_t)count);
    }
}

/* Takes pieces of work until none is left: part 0 is gate and up, part 2 is down. */
static void take_pieces(FFExpertsCall *call, int part) {
    const FFExperts *of = &call->of;
    int64_t of_strips = ((part == 2 ? of->hidden : of->width) + 15) / 16;
    int pieces = (int)((of_strips + PIECE - 1) / PIECE), passed = 0, expert = 0;
    for (;;) {
        int piece = __atomic_fetch_add(&call->next[part / 2], 1, __ATOMIC_RELAXED);
        for (; expert < of->experts; expert++) {
            if (call->starts[expert + 1] == call->starts[expert] || !of->table[3 * expert]) continue;
            if (piece < passed + pieces) break;
            passed += pieces;
        }
        if (expert == of->experts) return;
        int start = call->starts[expert], m = call->starts[expert + 1] - start;
        int64_t begin = (int64_t)(piece - passed) * PIECE;
        int64_t end = begin + PIECE < of_strips ? begin + PIECE : of_strips;
        if (part == 0) {
            gate_and_up(call, expert, start, m, begin, end);
            continue;
        }
        FFMatrix down = matrix_of(of, expert, 2);
        strips(call, &down, start, m, begin, end, 2, call->given + (int64_t)start * of->hidden, of->hidden);
    }
}

/* This thread's share of the rows between gate and down, of the experts that are there. */
static void quantize_wide(const FFExpertsCall *call, const FFTeam *team) {
    int64_t begin, end;
    ff_share(team, (int64_t)call->tokens * call->top_k, 1, &begin, &end);
    for (int expert = 0; expert < call->of.experts; expert++) {
        int64_t first = call->starts[expert], last = call->starts[expert + 1];
        first = first > begin ? first : begin;
        last = last < end ? last : end;
        if (call->of.table[3 * expert]) ff_quantize(&call->wide_rows, call->wide, call->of.width, first, last);
    }
}

/* Columns of a token's sum, in the order of its choices. */
static void combine(const FFExpertsCall *call, const FFTeam *team) {
    int64_t begin, end, hidden = call->of.hidden, parts = (hidden + 255) / 256;
    ff_share(team, call->tokens * parts, 1, &begin, &end);
    for (int64_t piece = begin; piece < end; piece++) {
        int64_t n = piece / parts, from = piece % parts * 256, to = from + 256 < hidden ? from + 256 : hidden;
        float *y = call->y + n * call->y_stride;
        for (int64_t d = from; d < to; d++) y[d] = 0;
        for (int k = 0; k < call->top_k; k++) {
            float weight = call->weights[n * call->top_k + k];
            const float *row = call->given + call->row_of[n * call->top_k + k] * hidden;
            for (int64_t d = from; d < to; d++) y[d] += weight * row[d];
        }
    }
}

void ff_experts_team(FFExpertsCall *call, const FFTeam *team) {
    lay_out_x(call, team);
    ff_barrier(team);
    take_pieces(call, 0);
    ff_barrier(team);
    if (is_packed(&call->of)) {
        quantize_wide(call, team);
        ff_barrier(team);
    }
    take_pieces(call, 2);
    if (!call->y) return;
    ff_barrier(team);
    combine(call, team);
}

static void run(void *argument, const FFTeam *team) { ff_experts_team(argument, team); }

static void run_sum(void *argument, const FFTeam *team) { combine(argument, team); }

EXPORT void ff_experts(FFExpertsCall *call, int threads) {
    ff_experts_begin(call);
    const FFExperts *of = &call->of;
    int64_t work = (int64_t)3 * call->tokens * call->top_k * of->hidden * of->width;
    ff_parallel(ff_worth(call->tokens < 4 ? 4 * work : work, threads), run, call);
}

/* y from rows that calls without y have filled. */
EXPORT void ff_experts_sum(FFExpertsCall *call, int threads) {
    ff_experts_begin(call);
    ff_parallel(ff_worth((int64_t)call->tokens * call->top_k * call->of.hidden, threads), run_sum, call);
}
