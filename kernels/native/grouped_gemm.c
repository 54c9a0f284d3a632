// Few rows times large weights, expert by expert.
//
// Bound by reading the weights: each expert's weight is read from memory once, its rows wait in registers. A row's sums run over k in order, whatever other rows there are: results don't depend on the batch.
#include "simd.h"

#define WIDE 4  // vectors per column block
#define COLUMNS (WIDE * LANES)
#define TASK_COLUMNS (2 * COLUMNS)

// ROWS x COLUMNS of out, sums held in registers.
#define BLOCK(ROWS)                                                                                                        \
    static void block##ROWS(const float *x, int64_t K, const float *w, int64_t N, float *out) {                           \
        vf acc[ROWS][WIDE] = {0};                                                                                          \
        for (int64_t k = 0; k < K; k++, w += N) {                                                                          \
            vf column[WIDE];                                                                                               \
            _Pragma("GCC unroll 8") for (int c = 0; c < WIDE; c++) column[c] = load(w + c * LANES);                        \
            _Pragma("GCC unroll 8") for (int r = 0; r < ROWS; r++) {                                                       \
                vf value = splat(x[r * K + k]);                                                                            \
                _Pragma("GCC unroll 8") for (int c = 0; c < WIDE; c++) acc[r][c] += value * column[c];                     \
            }                                                                                                              \
        }                                                                                                                  \
        _Pragma("GCC unroll 8") for (int r = 0; r < ROWS; r++)                                                             \
            _Pragma("GCC unroll 8") for (int c = 0; c < WIDE; c++) store(out + r * N + c * LANES, acc[r][c]);              \
    }

BLOCK(1)
BLOCK(2)
BLOCK(3)
BLOCK(4)
BLOCK(5)
BLOCK(6)

#define MOST_ROWS (LANES == 16 ? 6 : 3)  // so that sums, columns and one value fit the registers

static void narrow(const float *x, int64_t rows, int64_t K, const float *w, int64_t N, int64_t columns, float *out) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c++) {
            float total = 0;
            for (int64_t k = 0; k < K; k++) total += x[r * K + k] * w[k * N + c];
            out[r * N + c] = total;
        }
}

static void columns_of(const float *x, int64_t rows, int64_t K, const float *w, int64_t N, int64_t first, int64_t last, float *out) {
    for (int64_t c = first; c < last; c += COLUMNS) {
        if (last - c < COLUMNS) {
            narrow(x, rows, K, w + c, N, last - c, out + c);
            return;
        }
        for (int64_t r = 0; r < rows; r += MOST_ROWS) {
            const float *from = x + r * K, *weight = w + c;
            float *to = out + r * N + c;
            switch (rows - r < MOST_ROWS ? rows - r : MOST_ROWS) {
                case 1: block1(from, K, weight, N, to); break;
                case 2: block2(from, K, weight, N, to); break;
                case 3: block3(from, K, weight, N, to); break;
                case 4: block4(from, K, weight, N, to); break;
                case 5: block5(from, K, weight, N, to); break;
                default: block6(from, K, weight, N, to);
            }
        }
    }
}

// x [sum(counts), K], weight [E, K, N] (N fastest), counts [E] -> out [sum(counts), N]. `active` and `start`: E numbers of room each.
void grouped_gemm(const float *x, const float *weight, const int64_t *counts, int64_t E, int64_t K, int64_t N, float *out,
                  int64_t *active, int64_t *start, int threads) {
    int64_t num_active = 0, row = 0;
    for (int64_t e = 0; e < E; row += counts[e++])
        if (counts[e]) {
            active[num_active] = e;
            start[num_active++] = row;
        }
    int64_t parts = (N + TASK_COLUMNS - 1) / TASK_COLUMNS;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t task = 0; task < num_active * parts; task++) {
        int64_t e = active[task / parts], first = task % parts * TASK_COLUMNS, from = start[task / parts];
        int64_t last = first + TASK_COLUMNS < N ? first + TASK_COLUMNS : N;
        columns_of(x + from * K, counts[e], K, weight + e * K * N, N, first, last, out + from * N);
    }
}
