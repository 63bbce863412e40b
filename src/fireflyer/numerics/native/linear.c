/* y = x Wᵀ over whole matrices of any kind: the entry that Python calls, and its form inside a team. */
#include "native.h"

#define PIECE 16       /* strips that a thread takes at a time */
#define CHUNK (1 << 20) /* bytes of quantised x that are gone over for each strip of W: a part of the second cache */

typedef struct {
    const FFMatrix *w;
    const float *x;
    float *y;
    int64_t x_stride, y_stride;
    int m;
    FFRows rows;
    int next; /* piece of work, taken by whoever is free: a thread that lost its core holds nobody up */
} Linear;

static int is_packed(const FFMatrix *w) { return w->kind == KIND_INT8 || w->kind == KIND_INT4; }

/* The strips of 16 outputs that are this thread's. */
static void own_strips(const FFMatrix *w, const FFTeam *team, int64_t *begin, int64_t *end) {
    ff_share(team, (w->rows + 15) / 16, w->rows > 512 ? 2 : 1, begin, end);
}

/* The strips [begin, end) of W, whose x, if W is packed, is in `rows`. */
static void linear_strips(const Linear *call, int64_t begin, int64_t end) {
    const FFMatrix *w = call->w;
    if (is_packed(w)) ff_packed_strips(w, &call->rows, call->y, call->y_stride, begin, end);
    else
        ff_float_rows(w, call->x, call->x_stride, call->m, call->y, call->y_stride, begin * 16,
                      end * 16 < w->rows ? end * 16 : w->rows);
}

void ff_linear_team(const FFMatrix *w, const float *x, int64_t x_stride, int m, float *y, int64_t y_stride,
                    const FFTeam *team) {
    int64_t begin, end;
    own_strips(w, team, &begin, &end);
    Linear call = {w, x, y, x_stride, y_stride, m, {0}, 0};
    if (is_packed(w)) {
        /* Each thread quantises x for itself: for few rows that is less than waiting for one another. */
        call.rows = ff_rows_in(ff_scratch(1, ff_rows_bytes(m, w->cols)), m, w->cols);
        ff_quantize(&call.rows, x, x_stride, 0, m);
    }
    linear_strips(&call, begin, end);
}

static void run(void *argument, const FFTeam *team) {
    Linear *call = argument;
    if (is_packed(call->w)) {
        int64_t begin, end;
        ff_share(team, call->m, 1, &begin, &end);
        ff_quantize(&call->rows, call->x, call->x_stride, begin, end);
        ff_barrier(team);
    }
    int64_t strips = (call->w->rows + 15) / 16;
    for (;;) {
        int64_t begin = (int64_t)__atomic_fetch_add(&call->next, 1, __ATOMIC_RELAXED) * PIECE;
        int64_t end = begin + PIECE < strips ? begin + PIECE : strips;
        if (begin >= strips) return;
        linear_strips(call, begin, end);
    }
}

EXPORT void ff_linear(const FFMatrix *w, const float *x, int64_t x_stride, int m, float *y, int64_t y_stride,
                      int threads) {
    int chunk = m;
    if (is_packed(w)) chunk = CHUNK / w->cols < 48 ? 48 : CHUNK / w->cols / 48 * 48;
    for (int first = 0; first < m; first += chunk) {
        int count = m - first < chunk ? m - first : chunk;
        Linear call = {w, x + first * x_stride, y + first * y_stride, x_stride, y_stride, count, {0}, 0};
        if (is_packed(w)) {
            call.rows = ff_rows_in(ff_scratch(2, ff_rows_bytes(count, w->cols)), count, w->cols);
        }
        ff_parallel(ff_worth((int64_t)w->rows * w->cols * (count < 4 ? 4 : count), threads), run, &call);
    }
}
