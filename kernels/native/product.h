// A small matrix product with its sums in registers: few rows, any strides, weights with the columns running fastest.
// A row's sums run over k in order, whatever other rows and columns there are: results don't depend on the batch.
#ifndef MOESAIC_PRODUCT_H
#define MOESAIC_PRODUCT_H

#include "simd.h"

#define ALWAYS_INLINE static inline __attribute__((always_inline))
#define MOST_ROWS (LANES == 16 ? 6 : 3)  // so that sums, columns and one value fit the registers
#define WIDE 4                           // vectors per column block

#define AHEAD 8                          // rows of weights to ask memory for; its own prefetcher stops at the end of a page

// x [rows, K], w [K, N], out [rows, N]: the first element and the distance between rows of each.
typedef struct {
    const float *x;
    int64_t x_stride;
    const float *w;
    int64_t w_stride;
    float *out;
    int64_t out_stride;
    int64_t K;
    int add;  // to what `out` holds
} Product;

ALWAYS_INLINE void product_block(Product p, const int rows, const int vectors) {
    vf acc[MOST_ROWS][WIDE];
    _Pragma("GCC unroll 8") for (int r = 0; r < rows; r++)
        _Pragma("GCC unroll 8") for (int c = 0; c < vectors; c++)
            acc[r][c] = p.add ? load(p.out + r * p.out_stride + c * LANES) : (vf){0};
    for (int64_t k = 0; k < p.K; k++, p.w += p.w_stride) {
        vf column[WIDE];
        _Pragma("GCC unroll 8") for (int c = 0; c < vectors; c++) {
            column[c] = load(p.w + c * LANES);
            __builtin_prefetch(p.w + AHEAD * p.w_stride + c * LANES);
        }
        _Pragma("GCC unroll 8") for (int r = 0; r < rows; r++) {
            vf value = splat(p.x[r * p.x_stride + k]);
            _Pragma("GCC unroll 8") for (int c = 0; c < vectors; c++) acc[r][c] += value * column[c];
        }
    }
    _Pragma("GCC unroll 8") for (int r = 0; r < rows; r++)
        _Pragma("GCC unroll 8") for (int c = 0; c < vectors; c++) store(p.out + r * p.out_stride + c * LANES, acc[r][c]);
}

ALWAYS_INLINE void product_rows(Product p, int64_t rows, const int vectors) {
    for (; rows > 0; rows -= MOST_ROWS, p.x += MOST_ROWS * p.x_stride, p.out += MOST_ROWS * p.out_stride) {
        switch (rows < MOST_ROWS ? rows : MOST_ROWS) {
            case 1: product_block(p, 1, vectors); break;
            case 2: product_block(p, 2, vectors); break;
#if LANES == 16
            case 3: product_block(p, 3, vectors); break;
            case 4: product_block(p, 4, vectors); break;
            case 5: product_block(p, 5, vectors); break;
#endif
            default: product_block(p, MOST_ROWS, vectors);
        }
    }
}

static void product_narrow(Product p, int64_t rows, int64_t columns) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c++) {
            float total = p.add ? p.out[r * p.out_stride + c] : 0;
            for (int64_t k = 0; k < p.K; k++) total += p.x[r * p.x_stride + k] * p.w[k * p.w_stride + c];
            p.out[r * p.out_stride + c] = total;
        }
}

// All of it: `rows` rows, `columns` columns.
static inline void product(Product p, int64_t rows, int64_t columns) {
    for (; columns >= WIDE * LANES; columns -= WIDE * LANES, p.w += WIDE * LANES, p.out += WIDE * LANES) product_rows(p, rows, WIDE);
    for (; columns >= 2 * LANES; columns -= 2 * LANES, p.w += 2 * LANES, p.out += 2 * LANES) product_rows(p, rows, 2);
    for (; columns >= LANES; columns -= LANES, p.w += LANES, p.out += LANES) product_rows(p, rows, 1);
    product_narrow(p, rows, columns);
}

#endif
