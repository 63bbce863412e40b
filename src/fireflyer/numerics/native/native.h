/* The kernels' one description of a matrix, of a team of threads, and of what each source file offers the others.
 *
 * Every kernel computes y = x Wᵀ on raw pointers, knows nothing of torch, and has its oracle in torch (see library.py).
 * A *team* is the threads inside one parallel region: each calls the same `_team` function with its own `id`, and owns
 * some strips of output rows, so that a result never depends on how many threads there are. */
#ifndef FIREFLYER_NATIVE_H
#define FIREFLYER_NATIVE_H

#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

#if defined(__x86_64__)
/* For functions whose plain C the compiler shall turn into vectors of a level. */
#define AVX2_LOOPS __attribute__((target("avx2,fma")))
#if defined(__clang__)
#define AVX512_LOOPS __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#else
#define AVX512_LOOPS __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,prefer-vector-width=512")))
#endif
#endif

/* What the CPU can do, in rising order; a kernel takes the highest level that it has a form for. */
enum { LEVEL_SCALAR = 0, LEVEL_AVX2 = 1, LEVEL_AVX512 = 2, LEVEL_VNNI = 3, LEVEL_AMX = 4, LEVEL_NEON = 10 };

enum { KIND_FP32 = 0, KIND_BF16 = 1, KIND_INT8 = 2, KIND_INT4 = 3 };

/* W, `rows` outputs by `cols` inputs. fp32 and bf16: row-major, `stride` elements from row to row. int8 and int4: one
 * block of bytes as numerics/integer.py packs it; `stride` means nothing. */
typedef struct {
    const void *data;
    int64_t stride;
    int32_t rows, cols;
    int32_t kind;
} FFMatrix;

typedef struct {
    int id, count; /* this thread, of so many */
    int *barrier;  /* two ints, zero at first, shared by the team */
} FFTeam;

typedef void (*FFTask)(void *argument, const FFTeam *team);

/* Runs task on `threads` threads and returns when all are done. Uses torch's own OpenMP pool where it finds one. */
void ff_parallel(int threads, FFTask task, void *argument);
/* How many of `threads` are worth waking for so many multiplications (where memory is the limit, four times as many). */
int ff_worth(int64_t work, int threads);
/* Waits for the whole team, spinning: only between pieces of work of microseconds to milliseconds. */
void ff_barrier(const FFTeam *team);
/* The share of `count` things that this thread owns: [*begin, *end), in multiples of `step`. */
void ff_share(const FFTeam *team, int64_t count, int64_t step, int64_t *begin, int64_t *end);
/* At least `bytes` of this thread's own memory, aligned to 64; slots 0..3 are apart. */
void *ff_scratch(int slot, int64_t bytes);

int ff_level(void);

/* Rows of x as the packed kinds take them: int8 and what each row's and group's sums correct (numerics/integer.py). */
typedef struct {
    int8_t *q;       /* rows of `stride` bytes, the inputs padded with zeros; whole tiles of 16 rows can be read */
    int32_t *sums;   /* stride / 64 times 4 a row: for each pair of groups -8 Σa, -128 Σb, then -Σa and -Σb as 16 bits */
    int32_t *totals; /* -128 Σ of the row */
    float *scales;
    int64_t stride;
    int m, cols;
} FFRows;

/* Bytes that m rows of cols inputs take, and the same rows described in memory of that size, aligned to 64. */
int64_t ff_rows_bytes(int64_t m, int cols);
FFRows ff_rows_in(void *memory, int64_t m, int cols);
/* Quantises the rows [begin, end) of x into rows. */
void ff_quantize(const FFRows *rows, const float *x, int64_t x_stride, int64_t begin, int64_t end);
/* y[m, r] for the output rows r of the strips of 16 [begin, end): W is int8 or int4. */
void ff_packed_strips(const FFMatrix *w, const FFRows *x, float *y, int64_t y_stride, int64_t begin, int64_t end);

/* The experts of one layer, all of one shape and kind: table[3 e], [3 e + 1] and [3 e + 2] are where expert e's gate,
 * up (width, hidden) and down (hidden, width) lie, or NULL where this call has nothing to do with e. fp32 and bf16 are
 * row-major without gaps. */
typedef struct {
    const void *const *table;
    int32_t experts, hidden, width, kind;
} FFExperts;

/* y[n] = Σ_k weights[n, k] · expert indices[n, k] (x[n]), each expert down(silu(gate x) · up x): the request, and what
 * `ff_experts_begin` lays out for the team. */
typedef struct {
    FFExperts of;
    const float *x;
    float *y; /* NULL: only `rows` is filled, for the experts that are there */
    float *rows; /* tokens * top_k rows of hidden: what each chosen expert gave, by expert, then token; NULL: own memory */
    const int64_t *indices;
    const float *weights;
    int64_t x_stride, y_stride;
    int32_t tokens, top_k;
    /* laid out by ff_experts_begin: */
    float *given;             /* `rows`, or own memory */
    int32_t *starts, *row_of; /* where each expert's rows start; the row of each (token, k) */
    float *wide, *gathered;   /* silu(gate) · up; rows of x in the order of experts */
    FFRows x_rows, wide_rows;
    int32_t next[2]; /* the next piece of work, taken by whoever is free */
} FFExpertsCall;

/* By one thread, before the team begins; uses the scratch slots 2 and 3 of that thread. */
void ff_experts_begin(FFExpertsCall *call);
void ff_experts_team(FFExpertsCall *call, const FFTeam *team);

/* y[m, r] = Σ_k x[m, k] W[r, k] for the strips that this thread owns; any number of rows m, made for few. fp32 x. */
void ff_linear_team(const FFMatrix *w, const float *x, int64_t x_stride, int m, float *y, int64_t y_stride,
                    const FFTeam *team);
void ff_float_rows(const FFMatrix *w, const float *x, int64_t x_stride, int m, float *y, int64_t y_stride,
                   int64_t begin, int64_t end);

#endif
