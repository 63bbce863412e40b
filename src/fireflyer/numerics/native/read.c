/* Reads memory as fast as it comes and does next to nothing with it: the yardstick for all that streams weights. */
#include "native.h"

typedef struct {
    const uint64_t *words;
    int64_t count;
    uint64_t sum;
} Read;

/* Four streams, as the kernels have several too. */
static inline __attribute__((always_inline)) uint64_t add_up(const uint64_t *words, int64_t count) {
    uint64_t sums[8] = {0};
    int64_t quarter = count / 4;
    for (int64_t i = 0; i + 8 <= quarter; i += 8)
        for (int lane = 0; lane < 8; lane++)
            sums[lane] += (words[i + lane] ^ words[quarter + i + lane]) +
                          (words[2 * quarter + i + lane] ^ words[3 * quarter + i + lane]);
    uint64_t sum = 0;
    for (int lane = 0; lane < 8; lane++) sum += sums[lane];
    return sum;
}

static uint64_t add_up_plain(const uint64_t *words, int64_t count) { return add_up(words, count); }

#if defined(__x86_64__)
AVX2_LOOPS static uint64_t add_up_avx2(const uint64_t *words, int64_t count) { return add_up(words, count); }
AVX512_LOOPS static uint64_t add_up_avx512(const uint64_t *words, int64_t count) { return add_up(words, count); }
#endif

static void run(void *argument, const FFTeam *team) {
    Read *read = argument;
    int64_t begin, end;
    ff_share(team, read->count, 64, &begin, &end);
    uint64_t (*add)(const uint64_t *, int64_t) = add_up_plain;
#if defined(__x86_64__)
    if (ff_level() >= LEVEL_AVX512) add = add_up_avx512;
    else if (ff_level() >= LEVEL_AVX2) add = add_up_avx2;
#endif
    __atomic_fetch_add(&read->sum, add(read->words + begin, end - begin), __ATOMIC_RELAXED);
}

/* A number that depends on every byte but the last few, so that none of the reading can be left out. */
EXPORT uint64_t ff_read(const void *data, int64_t bytes, int threads) {
    Read read = {data, bytes / 8, 0};
    ff_parallel(threads, run, &read);
    return read.sum;
}
