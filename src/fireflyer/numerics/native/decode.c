/* The decoder's layers over the few rows of a decoding step, all of them in one region of threads, or as many as come
 * before experts that the caller has to fetch and compute.
 *
 * In: the rows' hidden states, where each row's latent goes in the paged cache and which blocks it sees. Out: the hidden
 * states after the last norm, the latents written, the experts chosen. Attention runs absorbed on the latents where they
 * lie: no block is gathered, no mask made. Who computes what is cut by rows, heads and strips of outputs, never by the
 * number of threads, so that this number changes no bit; the oracle is model/decoder.py.
 *
 * Letters as there: D hidden, H heads, P nope, R rope, V value, L latent, C = L + R, E experts, K of them chosen. */
#include <math.h>
#include <string.h>

#include "exponential.h"
#include "native.h"

#define INLINE static inline __attribute__((always_inline))
#define CHUNK 256 /* slots of one piece of a row's attention; its scores are kept */
#define SLOTS 16  /* of them at a time: converted once for all heads, added up in registers */
#define FEW_HEADS 4
#define MANY_HEADS 16 /* at a time, where a slot has to be converted before it can be read */

typedef struct {
    FFMatrix q_a, q_b, kv_a, kv_b, o; /* q_a.data NULL: q_b takes the hidden state itself. kv_b is fp32 or bf16 */
    FFMatrix gate_up, down;           /* a dense layer's, or the shared experts'; data NULL: none */
    FFMatrix router;                  /* fp32 or bf16 (E, D); data NULL: a dense layer */
    const float *input_norm, *q_norm, *kv_norm, *post_norm, *router_bias;
    FFExperts experts; /* table NULL: the caller computes them, between two calls */
    void *slots;      /* (blocks * block_size, C) of the cache's kind */
    float *scales;    /* int8: (blocks * block_size, 2) */
    int64_t *indices; /* (N, K), written */
} FFLayer;

typedef struct {
    const FFLayer *layers;
    const float *last_norm;
    float norm_eps, latent_eps, softmax_scale, routed_scale;
    int32_t num_layers, hidden, heads, nope, rope, value, latent;
    int32_t top_k, groups, open_groups, sigmoid, best_two, normalise; /* groups 1: no groups */
    int32_t cache_kind, block_size;
} FFDecoder;

typedef struct {
    float *x;                    /* (N, D), overwritten */
    float *y;                    /* (N, D), after the last norm, written with the last layer */
    float *h, *routed;           /* (N, D): what experts are given, and what they give */
    float *weights;              /* (N, K) of the chosen experts */
    void *memory;                /* ff_decode_bytes of it, the same for all calls of a step */
    const int64_t *positions;    /* a row sees the slots 0 .. position of its sequence */
    const int64_t *targets;      /* where its latent goes */
    const int64_t *tables;       /* blocks of all sequences */
    const int64_t *table_starts; /* where in them a row's begin */
    const float *cos, *sin;      /* (positions, R / 2) */
    int32_t rows;
    int32_t first, last; /* the layers of this call; a last one equal to first, behind all layers: only the last norm */
} FFStep;

typedef float v16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef float v8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef float v4 __attribute__((vector_size(16), aligned(4), may_alias));

typedef struct {
    const FFDecoder *of;
    const FFStep *step;
    float *qa, *q, *q_latent, *kv, *read, *out, *wide, *logits; /* what passes between parts */
    float *partial, *partial_max, *partial_sum; /* of each piece: (heads of a piece, L), (heads of a piece) twice */
    float *own;                                 /* per thread */
    int64_t own_floats;
    int32_t *piece_starts; /* the first piece of each row; at the end their number */
    int32_t *next;         /* by layer: the next piece of attention, taken by whoever is free */
    int heads_a_piece, widest;
    FFExpertsCall call;
} Work;

/* --- Arithmetic, compiled once for each level */

/* By halves: one after the other, the sixteen additions would wait for each other. */
INLINE float sum16(v16 v) {
    union {
        v16 all;
        v8 half[2];
    } sixteen = {v};
    union {
        v8 all;
        v4 half[2];
    } eight = {sixteen.half[0] + sixteen.half[1]};
    v4 four = eight.half[0] + eight.half[1];
    return (four[0] + four[2]) + (four[1] + four[3]);
}

INLINE float dot(const float *a, const float *b, int count) {
    v16 sums = {0};
    int k = 0;
    for (; k + 16 <= count; k += 16) sums += *(const v16 *)(a + k) * *(const v16 *)(b + k);
    float sum = sum16(sums);
    for (; k < count; k++) sum += a[k] * b[k];
    return sum;
}

INLINE void norm_row(const float *x, const float *weight, float *y, int count, float eps) {
    float inverse = 1 / sqrtf(dot(x, x, count) / (float)count + eps);
    for (int i = 0; i < count; i++) y[i] = x[i] * inverse * weight[i];
}

INLINE float from_bf16(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (value != value) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE const float *weight_row(const FFMatrix *w, int64_t row, float *memory) {
    if (w->kind == KIND_FP32) return (const float *)w->data + row * w->stride;
    const uint16_t *halves = (const uint16_t *)w->data + row * w->stride;
    for (int i = 0; i < w->cols; i++) memory[i] = from_bf16(halves[i]);
    return memory;
}

INLINE void turn(const float *x, float *y, const float *cos, const float *sin, int width) {
    for (int i = 0; i < width / 2; i++) {
        float even = x[2 * i], odd = x[2 * i + 1];
        y[2 * i] = even * cos[i] - odd * sin[i];
        y[2 * i + 1] = odd * cos[i] + even * sin[i];
    }
}

/* --- The cache */

INLINE void store_int8(const float *x, int8_t *to, float *scale, int count) {
    float most = 0;
    for (int i = 0; i < count; i++) most = fabsf(x[i]) > most || x[i] != x[i] ? fabsf(x[i]) : most;
    *scale = most / 127;
    float inverse = *scale > 0 ? 1 / *scale : 0;
    for (int i = 0; i < count; i++) to[i] = (int8_t)rintf(x[i] * inverse);
}

INLINE void store_latent(const Work *work, const FFLayer *layer, const float *x, int64_t slot) {
    int latent = work->of->latent, width = latent + work->of->rope;
    if (work->of->cache_kind == KIND_FP32) {
        memcpy((float *)layer->slots + slot * width, x, 4 * (size_t)width);
    } else if (work->of->cache_kind == KIND_BF16) {
        uint16_t *to = (uint16_t *)layer->slots + slot * width;
        for (int i = 0; i < width; i++) to[i] = to_bf16(x[i]);
    } else {
        int8_t *to = (int8_t *)layer->slots + slot * width;
        store_int8(x, to, layer->scales + 2 * slot, latent);
        store_int8(x + latent, to + latent, layer->scales + 2 * slot + 1, width - latent);
    }
}

INLINE const float *slot_at(const Work *work, const FFLayer *layer, const int64_t *table, int64_t place, int count,
                            float *memory) {
    int latent = work->of->latent, width = latent + work->of->rope, size = work->of->block_size;
    int64_t slot = table[place / size] * size + place % size;
    if (work->of->cache_kind == KIND_FP32) return (const float *)layer->slots + slot * width;
    if (work->of->cache_kind == KIND_BF16) {
        const uint16_t *from = (const uint16_t *)layer->slots + slot * width;
        for (int i = 0; i < count; i++) memory[i] = from_bf16(from[i]);
        return memory;
    }
    const int8_t *from = (const int8_t *)layer->slots + slot * width;
    const float *scales = layer->scales + 2 * slot;
    for (int i = 0; i < latent; i++) memory[i] = (float)from[i] * scales[0];
    for (int i = latent; i < count; i++) memory[i] = (float)from[i] * scales[1];
    return memory;
}

/* --- Attention */

/* Scores of `count` slots, one or two, for up to four heads. */
INLINE void score(const float *q, int64_t stride, const int heads, const float *const *kept, const int count, int width,
                  float scale, float *scores) {
    v16 sums[2][FEW_HEADS] = {{{0}}};
    int k = 0;
    for (; k + 16 <= width; k += 16)
        for (int h = 0; h < heads; h++)
            for (int s = 0; s < count; s++)
                sums[s][h] += *(const v16 *)(q + h * stride + k) * *(const v16 *)(kept[s] + k);
    for (int h = 0; h < heads; h++)
        for (int s = 0; s < count; s++) {
            float sum = sum16(sums[s][h]);
            for (int rest = k; rest < width; rest++) sum += q[h * stride + rest] * kept[s][rest];
            scores[h * CHUNK + s] = sum * scale;
        }
}

INLINE void score_slots(const float *q, int64_t stride, const int heads, const float *const *kept, int count, int width,
                        float scale, float *scores) {
    int s = 0;
    for (; s + 2 <= count; s += 2) score(q, stride, heads, kept + s, 2, width, scale, scores + s);
    if (s < count) score(q, stride, heads, kept + s, 1, width, scale, scores + s);
}

/* Adds what up to four heads read of some slots: sums stay in registers while the slots go by. */
INLINE void add_slots(const float *const *kept, int count, const float *weights, const int heads, int latent,
                      float *read) {
    int i = 0;
    for (; i + 32 <= latent; i += 32) {
        v16 sums[FEW_HEADS][2];
        for (int h = 0; h < heads; h++)
            for (int j = 0; j < 2; j++) sums[h][j] = *(const v16 *)(read + (int64_t)h * latent + i + 16 * j);
        for (int s = 0; s < count; s++)
            for (int h = 0; h < heads; h++)
                for (int j = 0; j < 2; j++)
                    sums[h][j] += weights[h * CHUNK + s] * *(const v16 *)(kept[s] + i + 16 * j);
        for (int h = 0; h < heads; h++)
            for (int j = 0; j < 2; j++) *(v16 *)(read + (int64_t)h * latent + i + 16 * j) = sums[h][j];
    }
    for (int h = 0; h < heads; h++)
        for (int s = 0; s < count; s++)
            for (int rest = i; rest < latent; rest++)
                read[(int64_t)h * latent + rest] += weights[h * CHUNK + s] * kept[s][rest];
}

/* One piece: some heads of one row over at most CHUNK slots; what they read, unscaled, their maximum and their sum. */
INLINE void attend_body(const Work *work, const FFLayer *layer, int row, int heads, const float *q, int64_t first,
                        int slots, float *read, float *max, float *sum) {
    const FFDecoder *of = work->of;
    const int64_t *table = work->step->tables + work->step->table_starts[row];
    int latent = of->latent, width = latent + of->rope;
    float scores[MANY_HEADS * CHUNK], kept_memory[SLOTS * width];
    const float *kept[SLOTS];
    for (int s = 0; s < slots; s += SLOTS) {
        int count = slots - s < SLOTS ? slots - s : SLOTS, h = 0;
        for (int i = 0; i < count; i++)
            kept[i] = slot_at(work, layer, table, first + s + i, width, kept_memory + i * width);
        for (; h + FEW_HEADS <= heads; h += FEW_HEADS)
            score_slots(q + (int64_t)h * width, width, FEW_HEADS, kept, count, width, of->softmax_scale,
                        scores + h * CHUNK + s);
        for (; h < heads; h++)
            score_slots(q + (int64_t)h * width, width, 1, kept, count, width, of->softmax_scale, scores + h * CHUNK + s);
    }
    for (int h = 0; h < heads; h++) {
        float *own = scores + h * CHUNK, most = own[0];
        v16 sums = {0};
        for (int s = 1; s < slots; s++) most = own[s] > most ? own[s] : most;
        for (int s = 0; s < slots; s++) own[s] = exponential(own[s] - most);
        int rest = 0;
        for (; rest + 16 <= slots; rest += 16) sums += *(const v16 *)(own + rest);
        float total = sum16(sums);
        for (; rest < slots; rest++) total += own[rest];
        max[h] = most;
        sum[h] = total;
    }
    memset(read, 0, 4 * (size_t)heads * (size_t)latent);
    for (int s = 0; s < slots; s += SLOTS) {
        int count = slots - s < SLOTS ? slots - s : SLOTS, h = 0;
        for (int i = 0; i < count; i++)
            kept[i] = slot_at(work, layer, table, first + s + i, latent, kept_memory + i * width);
        for (; h + FEW_HEADS <= heads; h += FEW_HEADS)
            add_slots(kept, count, scores + h * CHUNK + s, FEW_HEADS, latent, read + (int64_t)h * latent);
        for (; h < heads; h++) add_slots(kept, count, scores + h * CHUNK + s, 1, latent, read + (int64_t)h * latent);
    }
}

/* The query of a head on the latent, for all rows: q_nope · W_up_key, and the rotated part beside it. */
INLINE void absorb_body(const Work *work, const FFLayer *layer, int head, float *own) {
    const FFDecoder *of = work->of;
    const FFStep *step = work->step;
    int width = of->nope + of->rope, latent = of->latent, kept = latent + of->rope;
    for (int n = 0; n < step->rows; n++) {
        const float *q = work->q + ((int64_t)n * of->heads + head) * width;
        float *to = work->q_latent + ((int64_t)n * of->heads + head) * kept;
        memset(to, 0, 4 * (size_t)latent);
        int64_t at = step->positions[n] * (of->rope / 2);
        turn(q + of->nope, to + latent, step->cos + at, step->sin + at, of->rope);
    }
    for (int p = 0; p < of->nope; p++) {
        const float *up = weight_row(&layer->kv_b, (int64_t)head * (of->nope + of->value) + p, own);
        for (int n = 0; n < step->rows; n++) {
            float factor = work->q[((int64_t)n * of->heads + head) * width + p];
            float *to = work->q_latent + ((int64_t)n * of->heads + head) * kept;
            for (int i = 0; i < latent; i++) to[i] += factor * up[i];
        }
    }
}

/* What a head has read, from its pieces, expanded to its values. own: L floats, and N times L. */
INLINE void expand_body(const Work *work, const FFLayer *layer, int head, float *own) {
    const FFDecoder *of = work->of;
    int latent = of->latent, of_piece = work->heads_a_piece, groups = (of->heads + of_piece - 1) / of_piece;
    float *read = own + latent;
    for (int n = 0; n < work->step->rows; n++) {
        float *to = read + (int64_t)n * latent, most = -INFINITY, total = 0;
        int first = work->piece_starts[n] + head / of_piece, last = work->piece_starts[n + 1], at = head % of_piece;
        for (int piece = first; piece < last; piece += groups) {
            float max = work->partial_max[(int64_t)piece * of_piece + at];
            most = max > most || max != max ? max : most;
        }
        memset(to, 0, 4 * (size_t)latent);
        for (int piece = first; piece < last; piece += groups) {
            int64_t place = (int64_t)piece * of_piece + at;
            float factor = exponential(work->partial_max[place] - most);
            total += factor * work->partial_sum[place];
            for (int i = 0; i < latent; i++) to[i] += factor * work->partial[place * latent + i];
        }
        for (int i = 0; i < latent; i++) to[i] /= total;
    }
    for (int v = 0; v < of->value; v++) {
        const float *up = weight_row(&layer->kv_b, (int64_t)head * (of->nope + of->value) + of->nope + v, own);
        for (int n = 0; n < work->step->rows; n++)
            work->read[((int64_t)n * of->heads + head) * of->value + v] = dot(up, read + (int64_t)n * latent, latent);
    }
}

/* --- Rows between the matrices */

INLINE void rows_body(const Work *work, const float *weight, const float *add, const float *more, float *to, int64_t begin,
                      int64_t end) {
    int hidden = work->of->hidden;
    for (int64_t n = begin; n < end; n++) {
        float *x = work->step->x + n * hidden;
        if (add)
            for (int i = 0; i < hidden; i++) x[i] += add[n * hidden + i];
        if (more)
            for (int i = 0; i < hidden; i++) x[i] += more[n * hidden + i];
        norm_row(x, weight, to + n * hidden, hidden, work->of->norm_eps);
    }
}

INLINE void latents_body(const Work *work, const FFLayer *layer, int64_t begin, int64_t end) {
    const FFDecoder *of = work->of;
    const FFStep *step = work->step;
    int latent = of->latent, width = latent + of->rope, rank = layer->q_a.rows;
    float row[width];
    for (int64_t n = begin; n < end; n++) {
        const float *kv = work->kv + n * width;
        int64_t at = step->positions[n] * (of->rope / 2);
        norm_row(kv, layer->kv_norm, row, latent, of->latent_eps);
        turn(kv + latent, row + latent, step->cos + at, step->sin + at, of->rope);
        store_latent(work, layer, row, step->targets[n]);
        if (layer->q_a.data) norm_row(work->qa + n * rank, layer->q_norm, work->qa + n * rank, rank, of->latent_eps);
    }
}

INLINE void swiglu_body(const Work *work, int width, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n++) {
        float *gate = work->wide + n * 2 * width, *up = gate + width;
        for (int i = 0; i < width; i++) gate[i] = gate[i] / (1 + exponential(-gate[i])) * up[i];
    }
}

#define AT_LEVEL(name, attributes)                                                                                    \
    attributes static void attend_##name(const Work *work, const FFLayer *layer, int row, int heads, const float *q,  \
                                         int64_t first, int slots, float *read, float *max, float *sum) {             \
        attend_body(work, layer, row, heads, q, first, slots, read, max, sum);                                        \
    }                                                                                                                 \
    attributes static void absorb_##name(const Work *work, const FFLayer *layer, int head, float *own) {              \
        absorb_body(work, layer, head, own);                                                                          \
    }                                                                                                                 \
    attributes static void expand_##name(const Work *work, const FFLayer *layer, int head, float *own) {              \
        expand_body(work, layer, head, own);                                                                          \
    }                                                                                                                 \
    attributes static void rows_##name(const Work *work, const float *weight, const float *add, const float *more,    \
                                       float *to, int64_t begin, int64_t end) {                                       \
        rows_body(work, weight, add, more, to, begin, end);                                                           \
    }                                                                                                                 \
    attributes static void latents_##name(const Work *work, const FFLayer *layer, int64_t begin, int64_t end) {       \
        latents_body(work, layer, begin, end);                                                                        \
    }                                                                                                                 \
    attributes static void swiglu_##name(const Work *work, int width, int64_t begin, int64_t end) {                   \
        swiglu_body(work, width, begin, end);                                                                         \
    }                                                                                                                 \
    static const Forms name##_forms = {attend_##name, absorb_##name, expand_##name, rows_##name, latents_##name,      \
                                       swiglu_##name};

typedef struct {
    void (*attend)(const Work *, const FFLayer *, int, int, const float *, int64_t, int, float *, float *, float *);
    void (*absorb)(const Work *, const FFLayer *, int, float *);
    void (*expand)(const Work *, const FFLayer *, int, float *);
    void (*rows)(const Work *, const float *, const float *, const float *, float *, int64_t, int64_t);
    void (*latents)(const Work *, const FFLayer *, int64_t, int64_t);
    void (*swiglu)(const Work *, int, int64_t, int64_t);
} Forms;

AT_LEVEL(plain, )
#if defined(__x86_64__)
AT_LEVEL(avx2, AVX2_LOOPS)
AT_LEVEL(avx512, AVX512_LOOPS)
#endif

static const Forms *forms(void) {
#if defined(__x86_64__)
    if (ff_level() >= LEVEL_AVX512) return &avx512_forms;
    if (ff_level() >= LEVEL_AVX2) return &avx2_forms;
#endif
    return &plain_forms;
}

/* --- Routing: model/routing.py, row by row; among equals the lowest index wins */

static int best_of(const float *values, int count, const char *taken) {
    int best = -1;
    for (int i = 0; i < count; i++)
        if (!taken[i] && (best < 0 || values[i] > values[best])) best = i;
    return best;
}

static void close_groups(const FFDecoder *of, float *choice, int experts) {
    int size = experts / of->groups;
    float worth[of->groups];
    char open[of->groups];
    memset(open, 0, (size_t)of->groups);
    for (int g = 0; g < of->groups; g++) {
        float first = -INFINITY, second = -INFINITY;
        for (int i = g * size; i < (g + 1) * size; i++) {
            if (choice[i] > first) second = first, first = choice[i];
            else if (choice[i] > second) second = choice[i];
        }
        worth[g] = of->best_two ? first + second : first;
    }
    for (int k = 0; k < of->open_groups; k++) open[best_of(worth, of->groups, open)] = 1;
    for (int i = 0; i < experts; i++)
        if (!open[i / size]) choice[i] = -INFINITY;
}

static void route(Work *work, const FFLayer *layer, int64_t n) {
    const FFDecoder *of = work->of;
    int experts = layer->experts.experts;
    float *scores = work->logits + n * experts, *weights = work->step->weights + n * of->top_k, choice[experts], sum = 0;
    int64_t *indices = layer->indices + n * of->top_k;
    char taken[experts];
    if (of->sigmoid) {
        for (int e = 0; e < experts; e++) scores[e] = 1 / (1 + exponential(-scores[e]));
    } else {
        float most = scores[0];
        for (int e = 1; e < experts; e++) most = scores[e] > most ? scores[e] : most;
        for (int e = 0; e < experts; e++) sum += scores[e] = exponential(scores[e] - most);
        for (int e = 0; e < experts; e++) scores[e] /= sum;
    }
    for (int e = 0; e < experts; e++) choice[e] = scores[e] + (layer->router_bias ? layer->router_bias[e] : 0);
    if (of->groups > 1) close_groups(of, choice, experts);
    memset(taken, 0, (size_t)experts);
    sum = 0;
    for (int k = 0; k < of->top_k; k++) {
        indices[k] = best_of(choice, experts, taken);
        taken[indices[k]] = 1;
        sum += weights[k] = scores[indices[k]];
    }
    for (int k = 0; k < of->top_k; k++) {
        if (of->normalise) weights[k] /= sum + 1e-20f;
        weights[k] *= of->routed_scale;
    }
}

/* --- A layer, by every thread of the team */

static void attention(Work *work, const FFLayer *layer, int index, const FFTeam *team) {
    const FFDecoder *of = work->of;
    const FFStep *step = work->step;
    const Forms *run = forms();
    int rows = step->rows, kept = of->latent + of->rope, width = of->nope + of->rope, few = work->heads_a_piece;
    int groups = (of->heads + few - 1) / few;
    float *own = work->own + team->id * work->own_floats;
    int64_t begin, end;
    if (layer->q_a.data)
        ff_linear_team(&layer->q_a, work->step->h, of->hidden, rows, work->qa, layer->q_a.rows, team);
    else ff_linear_team(&layer->q_b, work->step->h, of->hidden, rows, work->q, of->heads * width, team);
    ff_linear_team(&layer->kv_a, work->step->h, of->hidden, rows, work->kv, kept, team);
    ff_barrier(team);
    ff_share(team, rows, 1, &begin, &end);
    run->latents(work, layer, begin, end);
    ff_barrier(team);
    if (layer->q_a.data) {
        ff_linear_team(&layer->q_b, work->qa, layer->q_a.rows, rows, work->q, of->heads * width, team);
        ff_barrier(team);
    }
    ff_share(team, of->heads, 1, &begin, &end);
    for (int64_t head = begin; head < end; head++) run->absorb(work, layer, (int)head, own);
    ff_barrier(team);
    int row = 0;
    for (;;) {
        int piece = __atomic_fetch_add(&work->next[index], 1, __ATOMIC_RELAXED);
        if (piece >= work->piece_starts[rows]) break;
        while (piece >= work->piece_starts[row + 1]) row++;
        int of_row = piece - work->piece_starts[row], head = of_row % groups * few;
        int64_t first = (int64_t)(of_row / groups) * CHUNK, slots = step->positions[row] + 1 - first;
        int64_t place = (int64_t)piece * few;
        run->attend(work, layer, row, of->heads - head < few ? of->heads - head : few,
                    work->q_latent + ((int64_t)row * of->heads + head) * kept, first, slots < CHUNK ? (int)slots : CHUNK,
                    work->partial + place * of->latent, work->partial_max + place, work->partial_sum + place);
    }
    ff_barrier(team);
    for (int64_t head = begin; head < end; head++) run->expand(work, layer, (int)head, own);
    ff_barrier(team);
    ff_linear_team(&layer->o, work->read, of->heads * of->value, rows, work->out, of->hidden, team);
    ff_barrier(team);
}

/* Leaves its result in `out`, and in `routed` where there are experts. */
static void feed_forward(Work *work, const FFLayer *layer, const FFTeam *team) {
    const FFDecoder *of = work->of;
    int rows = work->step->rows, width = layer->down.cols;
    int64_t begin, end;
    ff_share(team, rows, 1, &begin, &end);
    if (layer->router.data) {
        int experts = layer->experts.experts;
        ff_linear_team(&layer->router, work->step->h, of->hidden, rows, work->logits, experts, team);
    }
    if (layer->gate_up.data) ff_linear_team(&layer->gate_up, work->step->h, of->hidden, rows, work->wide, 2 * width, team);
    ff_barrier(team);
    if (layer->router.data)
        for (int64_t n = begin; n < end; n++) route(work, layer, n);
    if (layer->gate_up.data) forms()->swiglu(work, width, begin, end);
    ff_barrier(team);
    if (layer->experts.table && team->id == 0) {
        work->call = (FFExpertsCall){.of = layer->experts, .x = work->step->h, .y = work->step->routed, .indices = layer->indices,
                                     .weights = work->step->weights, .x_stride = of->hidden, .y_stride = of->hidden,
                                     .tokens = rows, .top_k = of->top_k};
        ff_experts_begin(&work->call);
    }
    if (layer->gate_up.data) ff_linear_team(&layer->down, work->wide, 2 * width, rows, work->out, of->hidden, team);
    ff_barrier(team);
    if (layer->experts.table) {
        ff_experts_team(&work->call, team);
        ff_barrier(team);
    }
}

/* Before layer `index`: what the one before it left is added, and normed. */
static void add_and_norm(const Work *work, int index, const float *norm, float *to, int64_t begin, int64_t end) {
    const FFLayer *before = index ? &work->of->layers[index - 1] : NULL;
    const float *add = before && before->gate_up.data ? work->out : NULL;
    forms()->rows(work, norm, add, before && before->router.data ? work->step->routed : NULL, to, begin, end);
}

static void run(void *argument, const FFTeam *team) {
    Work *work = argument;
    const FFDecoder *of = work->of;
    int64_t begin, end;
    ff_share(team, work->step->rows, 1, &begin, &end);
    for (int index = work->step->first; index < work->step->last; index++) {
        const FFLayer *layer = &of->layers[index];
        add_and_norm(work, index, layer->input_norm, work->step->h, begin, end);
        ff_barrier(team);
        attention(work, layer, index, team);
        forms()->rows(work, layer->post_norm, work->out, NULL, work->step->h, begin, end);
        ff_barrier(team);
        feed_forward(work, layer, team);
    }
    if (work->step->last < of->num_layers) return;
    const FFLayer *layer = &of->layers[of->num_layers - 1];
    int waits = layer->router.data && !layer->experts.table && work->step->first < work->step->last;
    if (!waits) add_and_norm(work, of->num_layers, of->last_norm, work->step->y, begin, end);
}

/* --- Memory for what passes between the parts, laid out once a step */

static float *take(char **memory, int64_t floats) {
    float *taken = (float *)*memory;
    *memory += (floats * 4 + 63) / 64 * 64;
    return taken;
}

static int64_t lay_out(Work *work, char *memory, int threads) {
    const FFDecoder *of = work->of;
    char *start = memory;
    int64_t rows = work->step->rows, heads = of->heads, most_q = 0, most_wide = 0, most_experts = 0;
    for (int i = 0; i < of->num_layers; i++) {
        const FFLayer *layer = &of->layers[i];
        if (layer->q_a.data && layer->q_a.rows > most_q) most_q = layer->q_a.rows;
        if (layer->gate_up.data && layer->gate_up.rows > most_wide) most_wide = layer->gate_up.rows;
        if (layer->router.data && layer->experts.experts > most_experts) most_experts = layer->experts.experts;
    }
    work->piece_starts = (int32_t *)take(&memory, rows + 1);
    work->next = (int32_t *)take(&memory, of->num_layers);
    work->out = take(&memory, rows * of->hidden);
    work->qa = take(&memory, rows * most_q);
    work->q = take(&memory, rows * heads * (of->nope + of->rope));
    work->q_latent = take(&memory, rows * heads * (of->latent + of->rope));
    work->kv = take(&memory, rows * (of->latent + of->rope));
    work->read = take(&memory, rows * heads * of->value);
    work->wide = take(&memory, rows * most_wide);
    work->logits = take(&memory, rows * most_experts);
    work->heads_a_piece = of->cache_kind == KIND_FP32 ? FEW_HEADS : MANY_HEADS;
    int64_t groups = (heads + work->heads_a_piece - 1) / work->heads_a_piece, pieces = 0;
    for (int64_t n = 0; n < rows; n++) pieces += (work->step->positions[n] / CHUNK + 1) * groups;
    work->partial = take(&memory, pieces * work->heads_a_piece * of->latent);
    work->partial_max = take(&memory, pieces * work->heads_a_piece);
    work->partial_sum = take(&memory, pieces * work->heads_a_piece);
    work->own_floats = (of->latent * (rows + 1) + 15) / 16 * 16;
    work->own = take(&memory, threads * work->own_floats);
    return memory - start;
}

EXPORT int64_t ff_decode_bytes(const FFDecoder *decoder, const FFStep *step, int threads) {
    Work work = {.of = decoder, .step = step};
    return lay_out(&work, NULL, threads) + 64;
}

EXPORT void ff_decode(const FFDecoder *decoder, const FFStep *step, int threads) {
    Work work = {.of = decoder, .step = step};
    lay_out(&work, (char *)(((uintptr_t)step->memory + 63) / 64 * 64), threads);
    int64_t groups = (decoder->heads + work.heads_a_piece - 1) / work.heads_a_piece;
    work.piece_starts[0] = 0;
    for (int n = 0; n < step->rows; n++)
        work.piece_starts[n + 1] = work.piece_starts[n] + (int32_t)((step->positions[n] / CHUNK + 1) * groups);
    memset(work.next, 0, 4 * (size_t)decoder->num_layers);
    ff_parallel(threads, run, &work);
}
