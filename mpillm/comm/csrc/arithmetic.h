/* Sums, maxima and minima over rows of memory, element by element. */
#ifndef MPILLM_ARITHMETIC_H
#define MPILLM_ARITHMETIC_H

#include <stddef.h>

/* In the order of ELEMENTS in buffers.py. */
enum element { FLOAT32, FLOAT64, FLOAT16, BFLOAT16, INT8, INT16, INT32, INT64, UINT8, UINT16, UINT32, UINT64, N_ELEMENTS };
enum reduction { SUM, MAX, MIN, N_REDUCTIONS };

/* The most rows of one reduction: ranks of one node. It bounds arrays of pointers on the stack. */
#define MOST_ROWS 1024

size_t itemsize_of(enum element element);

/*
 * targets[t][i] = scale * (sources[0][i] op sources[1][i] op ...) for i < count and every t.
 *
 * The sum is taken in one tree that depends on n_sources alone, so its bits do not depend on which
 * rank adds or in what pieces. Rows lo..hi are the sum of lo..mid and mid..hi, where mid - lo is the
 * largest power of two below hi - lo. 16-bit floats are summed in float32 and rounded once, to even.
 * A target may be one of the sources, at the same address. A scale of 1 leaves the sum as it is;
 * other scales are for floats.
 */
void reduce_rows(const unsigned char *const *sources, int n_sources, unsigned char *const *targets, int n_targets,
                 size_t count, enum element element, enum reduction reduction, double scale);

/* Convert a row of 16-bit floats to float32, and back: to the nearest, ties to even. */
void widen(float *out, const unsigned char *in, size_t n, enum element element);
void narrow(unsigned char *out, const float *in, size_t n, enum element element);

/* target[i] *= factor, for floats. */
void scale_row(unsigned char *target, size_t count, enum element element, double factor);

#endif
