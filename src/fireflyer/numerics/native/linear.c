/* y = x Wᵀ for few rows of x, over whole matrices: the entry that Python calls, and its team form. */
#include "native.h"

typedef struct {
    const FFMatrix *w;
    const float *x;
    float *y;
    int64_t x_stride, y_stride;
    int m;
} Linear;

void ff_linear_team(const FFMatrix *w, const float *x, int64_t x_stride, int m, float *y, int64_t y_stride,
                    const FFTeam *team) {
    int64_t begin, end;
    ff_share(team, w->rows, 16, &begin, &end);
    ff_float_rows(w, x, x_stride, m, y, y_stride, begin, end);
}

static void run(void *argument, const FFTeam *team) {
    Linear *call = argument;
    ff_linear_team(call->w, call->x, call->x_stride, call->m, call->y, call->y_stride, team);
}

EXPORT void ff_linear(const FFMatrix *w, const float *x, int64_t x_stride, int m, float *y, int64_t y_stride,
                      int threads) {
    Linear call = {w, x, y, x_stride, y_stride, m};
    ff_parallel(ff_worth((int64_t)w->rows * w->cols * (m < 4 ? 4 : m), threads), run, &call);
}
