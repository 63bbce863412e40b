/* y = x Wᵀ over whole matrices of any kind: the entry that Python calls, and its form inside a team. */
#include "native.h"

#define CHUNK (1 << 20) /* bytes of quantised x that are gone over for each strip of W: a part of the second cache */

typedef struct {
    const FFMatrix *w;
    const float *x;
    float *y;
    int64_t x_stride, y_stride;
    int m;
    FFRows rows;
} Linear;

static int is_packed(const FFMatrix *w) { return w->kind == KIND_INT8 || w->kind == KIND_INT4; }

/* The strips of 16 outputs that are this thread's. */
static void own_strips(const FFMatrix *w, const FFTeam *team, int64_t *begin, int64_t *end) {
    ff_share(team, (w->rows + 15) / 16, w->rows > 512 ? 2 : 1, begin, end);
}

void ff_linear_team(const FFMatrix *w, const float *x, int64_t x_stride, int m, float *y, int64_t y_stride,
                    const FFTeam *team) {
    int64_t begin, end;
    own_strips(w, team, &begin, &end);
    if (is_packed(w)) {
        /* Each thread quantises x for itself: for few rows that is less than waiting for one another. */
        FFRows rows = ff_rows_in(ff_scratch(1, ff_rows_bytes(m, w->cols)), m, w->cols);
        ff_quantize(&rows, x, x_stride, 0, m);
        ff_packed_strips(w, &rows, y, y_stride, begin, end);
        return;
    }
    ff_float_rows(w, x, x_stride, m, y, y_stride, begin * 16, end * 16 < w->rows ? end * 16 : w->rows);
}

static void run(void *argument, const FFTeam *team) {
    Linear *call = argument;
    if (!is_packed(call->w)) {
        ff_linear_team(call->w, call->x, call->x_stride, call->m, call->y, call->y_stride, team);
        return;
    }
    int64_t begin, end;
    ff_share(team, call->m, 1, &begin, &end);
    ff_quantize(&call->rows, call->x, call->x_stride, begin, end);
    ff_barrier(team);
    own_strips(call->w, team, &begin, &end);
    ff_packed_strips(call->w, &call->rows, call->y, call->y_stride, begin, end);
}

EXPORT void ff_linear(const FFMatrix *w, const float *x, int64_t x_stride, int m, float *y, int64_t y_stride,
                      int threads) {
    int chunk = m;
    if (is_packed(w)) chunk = CHUNK / w->cols < 48 ? 48 : CHUNK / w->cols / 48 * 48;
    for (int first = 0; first < m; first += chunk) {
        int count = m - first < chunk ? m - first : chunk;
        Linear call = {w, x + first * x_stride, y + first * y_stride, x_stride, y_stride, count, {0}};
        if (is_packed(w)) {
            call.rows = ff_rows_in(ff_scratch(2, ff_rows_bytes(count, w->cols)), count, w->cols);
        }
        ff_parallel(ff_worth((int64_t)w->rows * w->cols * (count < 4 ? 4 : count), threads), run, &call);
    }
}
