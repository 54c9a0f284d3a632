// Causal attention of packed chunks of prompt over expanded keys and values: a few queries at a time, all their scores in cache.
#include "attention.h"

#define TASK_ROWS (8 * MOST_ROWS)

typedef struct {
    int64_t first_row, rows, first_key, prefix;
} Chunk;

// query [T, N, K + R] -> out [T, N, V] for the rows of `chunks`: their keys are first_key .. first_key + prefix + rows, and row i sees the
// first prefix + i + 1 of them. key [N, K, L] and key_rope [R, L] with the keys running fastest, rows `stride` apart and readable up to
// a vector beyond L; value [L, N, V]. Room per thread: MOST_ROWS * room floats, room at least the longest context and a vector more.
void mla_prefill(const float *query, const float *key, const float *key_rope, int64_t stride, const float *value, const Chunk *chunks,
                 int64_t S, int64_t N, int64_t K, int64_t R, int64_t V, float scale, float *out, float *scratch,
                 int64_t room, int threads) {
    int64_t parts = 0, next = 0;
    for (int64_t s = 0; s < S; s++) {
        int64_t own = (chunks[s].rows + TASK_ROWS - 1) / TASK_ROWS;
        if (own > parts) parts = own;
    }
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
    for (int thread = 0; thread < threads; thread++) {
        float *scores = scratch + thread * MOST_ROWS * room;
        for (;;) {
            int64_t task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
            if (task >= S * N * parts) break;
            Chunk chunk = chunks[task / parts / N];
            int64_t n = task / parts % N, begin = task % parts * TASK_ROWS;
            int64_t end = begin + TASK_ROWS < chunk.rows ? begin + TASK_ROWS : chunk.rows;
            for (int64_t i = begin; i < end; i += MOST_ROWS) {
                int64_t rows = end - i < MOST_ROWS ? end - i : MOST_ROWS, seen = chunk.prefix + i + rows;
                int64_t columns = (seen + LANES - 1) / LANES * LANES, width = N * (K + R);
                const float *own = query + (chunk.first_row + i) * width + n * (K + R);
                Product by_content = {own, width, key + n * K * stride + chunk.first_key, stride, scores, room, K, 0};
                Product by_position = {own + K, width, key_rope + chunk.first_key, stride, scores, room, R, 1};
                product(by_content, rows, columns);
                product(by_position, rows, columns);
                for (int64_t r = 0; r < rows; r++) {
                    int64_t visible = seen - rows + r + 1;
                    softmax(scores + r * room, visible, scale);
                    for (int64_t t = visible; t < seen; t++) scores[r * room + t] = 0;
                }
                Product values = {scores, room, value + (chunk.first_key * N + n) * V, N * V,
                                  out + ((chunk.first_row + i) * N + n) * V, N * V, seen, 0};
                product(values, rows, V);
            }
        }
    }
}
