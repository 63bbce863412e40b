/* What this CPU can do, asked once; a test may lower it. */
#define _GNU_SOURCE
#include "packed.h"

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

static int level = -1;

#if defined(__x86_64__)
static int may_use_amx(void) {
#if defined(HAS_AMX)
    unsigned a = 7, b, c = 0, d;
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    if (!(d >> 24 & 1) || !(d >> 25 & 1)) return 0;
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0; /* ARCH_REQ_XCOMP_PERM for the tiles' data */
#else
    return 0;
#endif
}
#endif

static int best_level(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return LEVEL_SCALAR;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
        return LEVEL_AVX2;
    if (!__builtin_cpu_supports("avx512vnni")) return LEVEL_AVX512;
    return may_use_amx() ? LEVEL_AMX : LEVEL_VNNI;
#elif defined(__aarch64__) && defined(__APPLE__)
    return LEVEL_NEON;
#elif defined(__aarch64__) && defined(__linux__)
    return getauxval(AT_HWCAP) >> 20 & 1 ? LEVEL_NEON : LEVEL_SCALAR; /* HWCAP_ASIMDDP */
#else
    return LEVEL_SCALAR;
#endif
}

EXPORT int ff_level(void) {
    if (level < 0) level = best_level();
    return level;
}

/* Levels that this CPU has, no more: asking for one that it has not leaves the best. Returns what holds now. */
EXPORT int ff_set_level(int wanted) {
    int best = best_level();
    level = wanted >= 0 && wanted <= best && (best < LEVEL_NEON || wanted == LEVEL_SCALAR) ? wanted : best;
    return level;
}

/* Which sources this library was built from. */
EXPORT const char *ff_sources(void) { return FF_SOURCES; }
