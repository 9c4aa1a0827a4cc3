/* flexlora_ds.dropout.mask.dropped for a CPU: one pass over the values, no mask in memory, the same bits as keep_mask.
 * flexlora_ds/dropout/cpu_kernel.py compiles it; the constants and shifts are those of flexlora_ds/dropout/mask.py. */

#include <stdint.h>
#include <stdlib.h>

static inline uint32_t fold(uint32_t h) { return h ^ (h >> 16); }

static inline uint32_t scramble(uint32_t h) {
  h *= 0x7FEB352Du;
  h ^= (uint32_t)((int32_t)h >> 15);
  h *= 0x846CA68Bu;
  return fold(h);
}

/* A function for each width of an element: values of [rows, features], compared in lanes of that width; `out` may be
 * `values`. Returns 0, or 1 without memory. */
#define DROPPED(NAME, UNSIGNED, SIGNED)                                                                                \
  int NAME(const UNSIGNED *values, UNSIGNED *out, const int64_t *restrict row_keys,                                    \
           int64_t matrix_key, int64_t rows, int64_t features, int32_t whole, int32_t part, int threads) {             \
    const int64_t quads = (features + 3) / 4;                                                                          \
    uint32_t *scratch = malloc(sizeof(uint32_t) * quads * (1 + threads));                                              \
    if (scratch == NULL) return 1;                                                                                     \
    uint32_t *columns = scratch + quads * threads;                                                                     \
    for (int64_t q = 0; q < quads; q++) columns[q] = fold(scramble(fold((uint32_t)(q + 1))));                          \
    _Pragma("omp parallel for num_threads(threads) schedule(static)")                                                  \
    for (int t = 0; t < threads; t++) {                                                                                \
      uint32_t *hashes = scratch + quads * t;                                                                          \
      const int8_t *bytes = (const int8_t *)hashes;                                                                    \
      for (int64_t r = rows * t / threads; r < rows * (t + 1) / threads; r++) {                                        \
        const uint64_t mixed = ((uint64_t)row_keys[r] ^ (uint64_t)matrix_key) * 0x9E3779B97F4A7C15u;                   \
        const uint32_t seed = fold((uint32_t)(mixed >> 32));                                                           \
        const SIGNED limit = (SIGNED)(whole - 128 + ((int32_t)(mixed >> 16 & 0xFFFF) < part * 256));                   \
        const UNSIGNED *from = values + r * features;                                                                  \
        UNSIGNED *to = out + r * features;                                                                             \
        for (int64_t q = 0; q < quads; q++) hashes[q] = scramble(seed ^ columns[q]);                                   \
        _Pragma("omp simd")                                                                                            \
        for (int64_t f = 0; f < features; f++)                                                                         \
          to[f] = from[f] & (UNSIGNED) - (SIGNED)((SIGNED)bytes[f] >= limit);                                          \
      }                                                                                                                \
    }                                                                                                                  \
    free(scratch);                                                                                                     \
    return 0;                                                                                                          \
  }

DROPPED(dropped_2, uint16_t, int16_t)
DROPPED(dropped_4, uint32_t, int32_t)
DROPPED(dropped_8, uint64_t, int64_t)
