/* See arithmetic.h. Each loop is compiled for several vector widths; the loader picks the
 * processor's widest, so that one build serves a cluster of unlike nodes. */
#include "arithmetic.h"

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

/* A block of this many elements stays in the first-level cache between its sum and its write. */
#define BLOCK 1024
/* The depth of the tree over MOST_ROWS rows: log2(1024), and one for uneven counts. */
#define DEPTH 11

#if defined(__x86_64__) && defined(__GLIBC__) && (defined(__clang__) ? __clang_major__ >= 14 : __GNUC__ >= 9)
#define WIDE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define WIDE
#endif
#if defined(__clang__)
#define SAME_PLACE_OR_APART _Pragma("clang loop vectorize(assume_safety)")
#else
#define SAME_PLACE_OR_APART _Pragma("GCC ivdep")
#endif

typedef void combine_function(void *out, const void *left, const void *right, size_t n);

#define COMBINE(name, type, expression)                                                                                \
    WIDE static void name(void *out, const void *left, const void *right, size_t n) {                                  \
        type *o = out;                                                                                                 \
        const type *l = left, *r = right;                                                                              \
        SAME_PLACE_OR_APART                                                                                            \
        for (size_t i = 0; i < n; i++) {                                                                               \
            const type a = l[i], b = r[i];                                                                             \
            o[i] = (type)(expression);                                                                                 \
        }                                                                                                              \
    }
/* A NaN on either side is kept: max and min must not hide it. */
#define COMBINE_FLOATS(type)                                                                                           \
    COMBINE(sum_##type, type, a + b)                                                                                   \
    COMBINE(max_##type, type, a > b || a != a ? a : b)                                                                 \
    COMBINE(min_##type, type, a < b || a != a ? a : b)
/* Signed integers wrap, as NumPy's and torch's do: they are added as unsigned ones. */
#define COMBINE_INTEGERS(type, unsigned_type)                                                                          \
    COMBINE(sum_##type, type, (unsigned_type)a + (unsigned_type)b)                                                     \
    COMBINE(max_##type, type, a > b ? a : b)                                                                           \
    COMBINE(min_##type, type, a < b ? a : b)

COMBINE_FLOATS(float)
COMBINE_FLOATS(double)
COMBINE_INTEGERS(int8_t, uint8_t)
COMBINE_INTEGERS(int16_t, uint16_t)
COMBINE_INTEGERS(int32_t, uint32_t)
COMBINE_INTEGERS(int64_t, uint64_t)
COMBINE_INTEGERS(uint8_t, uint8_t)
COMBINE_INTEGERS(uint16_t, uint16_t)
COMBINE_INTEGERS(uint32_t, uint32_t)
COMBINE_INTEGERS(uint64_t, uint64_t)

#define ALL_THREE(type) {sum_##type, max_##type, min_##type}
static combine_function *const COMBINERS[N_ELEMENTS][N_REDUCTIONS] = {
    [FLOAT32] = ALL_THREE(float),   [FLOAT64] = ALL_THREE(double),  [FLOAT16] = ALL_THREE(float),
    [BFLOAT16] = ALL_THREE(float),  [INT8] = ALL_THREE(int8_t),     [INT16] = ALL_THREE(int16_t),
    [INT32] = ALL_THREE(int32_t),   [INT64] = ALL_THREE(int64_t),   [UINT8] = ALL_THREE(uint8_t),
    [UINT16] = ALL_THREE(uint16_t), [UINT32] = ALL_THREE(uint32_t), [UINT64] = ALL_THREE(uint64_t),
};

size_t itemsize_of(enum element element) {
    static const size_t sizes[N_ELEMENTS] = {4, 8, 2, 2, 1, 2, 4, 8, 1, 2, 4, 8};
    return sizes[element];
}

WIDE static void multiply_float(float *x, float factor, size_t n) {
    for (size_t i = 0; i < n; i++)
        x[i] *= factor;
}

WIDE static void multiply_double(double *x, double factor, size_t n) {
    for (size_t i = 0; i < n; i++)
        x[i] *= factor;
}

/* ---- 16-bit floats: widened to float32, computed, rounded to the nearest, ties to even ---- */

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

WIDE static void widen_bfloat16(float *out, const uint16_t *in, size_t n) {
    for (size_t i = 0; i < n; i++)
        out[i] = float_of((uint32_t)in[i] << 16);
}

/* The bits of `value` rounded to a bfloat16, which is their upper half. */
static inline uint32_t rounded_bits(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    return (bits & 0x7fffffffu) > 0x7f800000u ? bits | 0x400000u : rounded;
}

WIDE static void narrow_bfloat16(uint16_t *out, const float *in, size_t n) {
    for (size_t i = 0; i < n; i++)
        out[i] = (uint16_t)(rounded_bits(in[i]) >> 16);
}

/* Two neighbours in one 32-bit word: vectors of 32-bit words exist on every processor. */
typedef uint32_t __attribute__((aligned(2), may_alias)) two_bfloat16;

/* Two rows, the commonest case, without a scratch row of float32. */
WIDE static void sum_pair_bfloat16(void *out, const void *left, const void *right, size_t n) {
    two_bfloat16 *o = out;
    const two_bfloat16 *l = left, *r = right;
    SAME_PLACE_OR_APART
    for (size_t i = 0; i < n / 2; i++) {
        const uint32_t upper = rounded_bits(float_of(l[i] & 0xffff0000u) + float_of(r[i] & 0xffff0000u));
        const uint32_t lower = rounded_bits(float_of(l[i] << 16) + float_of(r[i] << 16));
        o[i] = (upper & 0xffff0000u) | lower >> 16;
    }
    if (n % 2 != 0) {
        uint16_t *last = (uint16_t *)out + n - 1;
        const uint16_t a = ((const uint16_t *)left)[n - 1], b = ((const uint16_t *)right)[n - 1];
        *last = (uint16_t)(rounded_bits(float_of((uint32_t)a << 16) + float_of((uint32_t)b << 16)) >> 16);
    }
}

static inline float widen_half(uint16_t half) {
    /* The bias differs by 112; infinities stay infinite, and subnormals are scaled by 2^-24. */
    const uint32_t sign = (uint32_t)(half & 0x8000u) << 16, magnitude = half & 0x7fffu;
    if (magnitude >= 0x7c00u)
        return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    if (magnitude >= 0x400u)
        return float_of(sign | ((magnitude << 13) + (112u << 23)));
    return float_of(sign | bits_of((float)magnitude * 5.9604644775390625e-8f)); /* 2^-24 */
}

static inline uint16_t narrow_half(float value) {
    const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u)
        return (uint16_t)(sign | 0x7e00u | (magnitude >> 13 & 0x3ffu));
    if (magnitude >= 0x477ff000u) /* 65520 and more round to infinity */
        return (uint16_t)(sign | 0x7c00u);
    if (magnitude >= 0x38800000u) /* 2^-14, the smallest normal */
        return (uint16_t)(sign | ((magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13));
    /* Adding 0.5 leaves the multiple of 2^-24 that is nearest in the low bits of the sum. */
    return (uint16_t)(sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f)));
}

static void widen_float16_plain(float *out, const uint16_t *in, size_t n) {
    for (size_t i = 0; i < n; i++)
        out[i] = widen_half(in[i]);
}

static void narrow_float16_plain(uint16_t *out, const float *in, size_t n) {
    for (size_t i = 0; i < n; i++)
        out[i] = narrow_half(in[i]);
}

#if defined(__x86_64__)
#include <immintrin.h>

__attribute__((target("avx,f16c"))) static void widen_float16_f16c(float *out, const uint16_t *in, size_t n) {
    size_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(in + i))));
    widen_float16_plain(out + i, in + i, n - i);
}

__attribute__((target("avx,f16c"))) static void narrow_float16_f16c(uint16_t *out, const float *in, size_t n) {
    size_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128((__m128i *)(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
    narrow_float16_plain(out + i, in + i, n - i);
}

__attribute__((target("avx,f16c"))) static void sum_pair_float16(void *out, const void *left, const void *right,
                                                                  size_t n) {
    uint16_t *o = out;
    const uint16_t *l = left, *r = right;
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        const __m256 a = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(l + i)));
        const __m256 b = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(r + i)));
        _mm_storeu_si128((__m128i *)(o + i), _mm256_cvtps_ph(_mm256_add_ps(a, b), _MM_FROUND_TO_NEAREST_INT));
    }
    for (; i < n; i++)
        o[i] = narrow_half(widen_half(l[i]) + widen_half(r[i]));
}

#define CONVERTS_HALVES (__builtin_cpu_supports("avx") && __builtin_cpu_supports("f16c"))
#elif defined(__aarch64__)
static void widen_float16_f16c(float *out, const uint16_t *in, size_t n) {
    const __fp16 *halves = (const __fp16 *)in;
    for (size_t i = 0; i < n; i++)
        out[i] = halves[i];
}

static void narrow_float16_f16c(uint16_t *out, const float *in, size_t n) {
    __fp16 *halves = (__fp16 *)out;
    for (size_t i = 0; i < n; i++)
        halves[i] = (__fp16)in[i];
}

static void sum_pair_float16(void *out, const void *left, const void *right, size_t n) {
    __fp16 *o = out;
    const __fp16 *l = left, *r = right;
    SAME_PLACE_OR_APART
    for (size_t i = 0; i < n; i++)
        o[i] = (__fp16)((float)l[i] + (float)r[i]);
}

#define CONVERTS_HALVES true
#else
#define sum_pair_float16 NULL
#define widen_float16_f16c widen_float16_plain
#define narrow_float16_f16c narrow_float16_plain
#define CONVERTS_HALVES false
#endif

void widen(float *out, const unsigned char *in, size_t n, enum element element) {
    const uint16_t *halves = (const uint16_t *)in;
    if (element == BFLOAT16)
        widen_bfloat16(out, halves, n);
    else
        (CONVERTS_HALVES ? widen_float16_f16c : widen_float16_plain)(out, halves, n);
}

void narrow(unsigned char *out, const float *in, size_t n, enum element element) {
    uint16_t *halves = (uint16_t *)out;
    if (element == BFLOAT16)
        narrow_bfloat16(halves, in, n);
    else
        (CONVERTS_HALVES ? narrow_float16_f16c : narrow_float16_plain)(halves, in, n);
}

/* ---- the tree ---- */

typedef struct {
    const unsigned char *const *sources;
    size_t offset, n; /* the block: bytes from the start of each row, and elements */
    enum element element;
    combine_function *combine;
    bool narrow;                      /* 16-bit floats, computed in float32 */
    double (*scratch)[BLOCK];         /* a block of the widest type for each level */
} Block;

/* Sum rows lo to hi into scratch[level]; a single row is returned in place. */
static const void *sum_rows(const Block *block, int lo, int hi, int level) {
    void *own = block->scratch[level];
    if (hi - lo == 1) {
        const unsigned char *row = block->sources[lo] + block->offset;
        if (!block->narrow)
            return row;
        widen(own, row, block->n, block->element);
        return own;
    }
    int half = 1;
    while (2 * half < hi - lo)
        half *= 2;
    const void *left = sum_rows(block, lo, lo + half, level);
    const void *right = sum_rows(block, lo + half, hi, level + 1);
    block->combine(own, left, right, block->n);
    return own;
}

/* The function that sums two rows of this type in one pass; NULL where scratch is needed. */
static combine_function *pair_function(enum element element, enum reduction reduction) {
    if (element != FLOAT16 && element != BFLOAT16)
        return COMBINERS[element][reduction];
    if (reduction != SUM)
        return NULL;
    return element == BFLOAT16 ? sum_pair_bfloat16 : CONVERTS_HALVES ? sum_pair_float16 : NULL;
}

static void scale_block(const Block *block, void *sum, double scale) {
    if (block->element == FLOAT64)
        multiply_double(sum, scale, block->n);
    else
        multiply_float(sum, (float)scale, block->n);
}

void reduce_rows(const unsigned char *const *sources, int n_sources, unsigned char *const *targets, int n_targets,
                 size_t count, enum element element, enum reduction reduction, double scale) {
    double scratch[DEPTH + 1][BLOCK];
    const size_t itemsize = itemsize_of(element);
    Block block = {sources, 0, 0, element, COMBINERS[element][reduction], element == FLOAT16 || element == BFLOAT16,
                   scratch};
    combine_function *pair = n_sources == 2 && scale == 1.0 ? pair_function(element, reduction) : NULL;
    for (size_t first = 0; first < count; first += BLOCK) {
        block.offset = first * itemsize;
        block.n = count - first < BLOCK ? count - first : BLOCK;
        unsigned char *out = targets[0] + block.offset;
        if (pair != NULL) {
            /* In place is safe: with two rows no sum overwrites a row that is still to be read. */
            pair(out, sources[0] + block.offset, sources[1] + block.offset, block.n);
        } else {
            const void *sum = sum_rows(&block, 0, n_sources, 0);
            if (scale != 1.0) {
                if (sum != (const void *)scratch[0])
                    sum = memcpy(scratch[0], sum, block.n * itemsize);
                scale_block(&block, scratch[0], scale);
            }
            if (block.narrow)
                narrow(out, sum, block.n, element);
            else
                memmove(out, sum, block.n * itemsize);
        }
        for (int t = 1; t < n_targets; t++)
            memcpy(targets[t] + block.offset, out, block.n * itemsize);
    }
}

void scale_row(unsigned char *target, size_t count, enum element element, double factor) {
    const unsigned char *const source = target;
    reduce_rows(&source, 1, &target, 1, count, element, SUM, factor);
}
