/* Threads: torch's own OpenMP pool, found at run time, so that no second pool fights torch's for the same cores.
 *
 * libgomp (torch's, whatever its file is called) offers GOMP_parallel in the process's global symbols once torch is
 * loaded; linking it here would tie the library to one name and could bring a second copy. Where there is none, each
 * region makes its threads afresh: right, and slower by some tens of microseconds. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>

#include "native.h"

#define MAX_THREADS 256

typedef void (*GompParallel)(void (*task)(void *), void *argument, unsigned threads, unsigned flags);
typedef int (*GompNumber)(void);

static GompParallel gomp_parallel;
static GompNumber gomp_number, gomp_count;

typedef struct {
    FFTask task;
    void *argument;
    int count;
    int barrier[2] __attribute__((aligned(64)));
} Region;

typedef struct {
    Region *region;
    int id;
} Member;

/* Called once, when the library is loaded and torch is already there. 1: torch's pool is shared. */
EXPORT int ff_find_pool(void) {
    gomp_parallel = (GompParallel)dlsym(RTLD_DEFAULT, "GOMP_parallel");
    gomp_number = (GompNumber)dlsym(RTLD_DEFAULT, "omp_get_thread_num");
    gomp_count = (GompNumber)dlsym(RTLD_DEFAULT, "omp_get_num_threads");
    if (!gomp_number || !gomp_count) gomp_parallel = NULL;
    return gomp_parallel != NULL;
}

static void gomp_member(void *argument) {
    Region *region = argument;
    FFTeam team = {gomp_number(), gomp_count(), region->barrier}; /* the pool may give fewer than were asked for */
    region->task(region->argument, &team);
}

static void *thread_member(void *argument) {
    Member *member = argument;
    FFTeam team = {member->id, member->region->count, member->region->barrier};
    member->region->task(member->region->argument, &team);
    return NULL;
}

void ff_parallel(int threads, FFTask task, void *argument) {
    Region region = {task, argument, threads < 1 ? 1 : threads > MAX_THREADS ? MAX_THREADS : threads, {0, 0}};
    if (region.count == 1) {
        FFTeam team = {0, 1, region.barrier};
        task(argument, &team);
        return;
    }
    if (gomp_parallel) {
        gomp_parallel(gomp_member, &region, (unsigned)region.count, 0);
        return;
    }
    pthread_t made[MAX_THREADS];
    Member members[MAX_THREADS];
    for (int id = 0; id < region.count; id++) {
        members[id] = (Member){&region, id};
        if (id > 0 && pthread_create(&made[id], NULL, thread_member, &members[id])) abort(); /* as OpenMP itself does */
    }
    thread_member(&members[0]);
    for (int id = 1; id < region.count; id++) pthread_join(made[id], NULL);
}

int ff_worth(int64_t work, int threads) {
    int64_t most = work / (1 << 17) + 1;
    return most < threads ? (int)most : threads;
}

static inline void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

void ff_barrier(const FFTeam *team) {
    if (team->count == 1) return;
    int *arrived = &team->barrier[0], *round = &team->barrier[1];
    int now = __atomic_load_n(round, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(arrived, 1, __ATOMIC_ACQ_REL) == team->count) {
        __atomic_store_n(arrived, 0, __ATOMIC_RELAXED);
        __atomic_store_n(round, now + 1, __ATOMIC_RELEASE);
        return;
    }
    for (int spins = 0; __atomic_load_n(round, __ATOMIC_ACQUIRE) == now; spins++) {
        if (spins < 300) pause_briefly();
        else sched_yield(); /* another process has the core of a thread that we wait for */
    }
}

void ff_share(const FFTeam *team, int64_t count, int64_t step, int64_t *begin, int64_t *end) {
    int64_t steps = (count + step - 1) / step;
    int64_t from = steps * team->id / team->count * step, to = steps * (team->id + 1) / team->count * step;
    *begin = from < count ? from : count;
    *end = to < count ? to : count;
}

typedef struct {
    void *memory;
    int64_t bytes;
} Scratch;

static __thread Scratch scratches[4];

void *ff_scratch(int slot, int64_t bytes) {
    Scratch *scratch = &scratches[slot];
    if (scratch->bytes < bytes) {
        free(scratch->memory);
        int64_t rounded = (bytes + 4095) / 4096 * 4096;
        scratch->memory = aligned_alloc(64, (size_t)rounded);
        if (!scratch->memory) abort(); /* inside a region there is nobody to tell */
        scratch->bytes = rounded;
    }
    return scratch->memory;
}
