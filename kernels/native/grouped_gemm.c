// Few rows times large weights. Bound by reading the weights: each expert's weight is read from memory once, its rows wait in registers.
#include "product.h"

#define TASK_COLUMNS (2 * WIDE * LANES)

// x [sum(counts), K], weight [E, K, N] (N fastest), counts [E] -> out [sum(counts), N]. `room`: 2 * E numbers.
void grouped_gemm(const float *x, const float *weight, const int64_t *counts, int64_t E, int64_t K, int64_t N, float *out,
                  int64_t *room, int threads) {
    int64_t *active = room, *start = room + E, num_active = 0, row = 0;
    for (int64_t e = 0; e < E; row += counts[e++])
        if (counts[e]) {
            active[num_active] = e;
            start[num_active++] = row;
        }
    int64_t parts = (N + TASK_COLUMNS - 1) / TASK_COLUMNS;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t task = 0; task < num_active * parts; task++) {
        int64_t e = active[task / parts], first = task % parts * TASK_COLUMNS, from = start[task / parts];
        Product own = {x + from * K, K, weight + e * K * N + first, N, out + from * N + first, N, K, 0};
        product(own, counts[e], N - first < TASK_COLUMNS ? N - first : TASK_COLUMNS);
    }
}

// Each head's vectors through that head's matrix: x [T, heads, K + tail] with row and head strides, weight [heads, K, N] with strides,
// -> out [T, heads, N + tail]; the last `tail` elements of a vector pass as they are.
void head_product(const float *x, int64_t x_row, int64_t x_head, const float *weight, int64_t w_head, int64_t w_row, int64_t T,
                  int64_t heads, int64_t K, int64_t N, int64_t tail, float *out, int threads) {
    int64_t width = N + tail, row = heads * width;
#pragma omp parallel for num_threads(threads) if (threads > 1 && T * heads * K * N > 100000)
    for (int64_t h = 0; h < heads; h++) {
        Product own = {x + h * x_head, x_row, weight + h * w_head, w_row, out + h * width, row, K, 0};
        product(own, T, N);
        for (int64_t t = 0; t < T; t++)
            for (int64_t i = 0; i < tail; i++) out[t * row + h * width + N + i] = x[t * x_row + h * x_head + K + i];
    }
}
