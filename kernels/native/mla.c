// MLA on one step's rows: rotary embedding, the latent KV write, and decode in absorbed form straight over the pages.
#include <math.h>

#include "simd.h"

#define HEADS 4  // heads that share one reading of a latent row

static void rotate(const float *x, const float *rotation, int64_t dim, float *out) {
    for (int64_t i = 0; i < dim; i += 2) {
        float a = x[i], b = x[i + 1], cosine = rotation[i], sine = rotation[i + 1];
        out[i] = a * cosine - b * sine;
        out[i + 1] = a * sine + b * cosine;
    }
}

// x [T, heads, dim] in place, with strides; table [positions, dim] of (cosine, sine) pairs.
void rope_in_place(float *x, int64_t row_stride, int64_t head_stride, const float *table, const int64_t *positions, int64_t T,
                   int64_t heads, int64_t dim) {
    for (int64_t t = 0; t < T; t++)
        for (int64_t h = 0; h < heads; h++) {
            float *own = x + t * row_stride + h * head_stride;
            rotate(own, table + positions[t] * dim, dim, own);
        }
}

// Rows of (latent, rotary key) [T, latent_dim + dim] with a row stride -> normalised latent and rotated key in the pool's rows.
void write_latent(const float *x, int64_t stride, const float *weight, float eps, int64_t latent_dim, int64_t dim, const float *table,
                  const int64_t *positions, const int64_t *slots, int64_t T, float *pool) {
    for (int64_t t = 0; t < T; t++) {
        const float *from = x + t * stride;
        float *to = pool + slots[t] * (latent_dim + dim);
        float scale = 1.0f / sqrtf(dot(from, from, latent_dim) / (float)latent_dim + eps);
        for (int64_t i = 0; i < latent_dim; i++) to[i] = from[i] * scale * weight[i];
        rotate(from + latent_dim, table + positions[t] * dim, dim, to + latent_dim);
    }
}

typedef struct {
    const float *pool;
    const int64_t *pages;
    int64_t page_size, D;
} Rows;

static inline const float *row_of(const Rows *rows, int64_t t) {
    return rows->pool + (rows->pages[t / rows->page_size] * rows->page_size + t % rows->page_size) * rows->D;
}

// scores [heads][length] = scale * query . row
static inline __attribute__((always_inline)) void score(const Rows *rows, const float *query, int64_t heads, int64_t length, float scale, float *scores) {
    int64_t D = rows->D;
    for (int64_t t = 0; t < length; t++) {
        const float *row = row_of(rows, t);
        vf acc[HEADS] = {0};
        int64_t i = 0;
        for (; i + LANES <= D; i += LANES) {
            vf value = load(row + i);
            for (int64_t h = 0; h < heads; h++) acc[h] += value * load(query + h * D + i);
        }
        for (int64_t h = 0; h < heads; h++) {
            float total = sum(acc[h]);
            for (int64_t rest = i; rest < D; rest++) total += row[rest] * query[h * D + rest];
            scores[h * length + t] = total * scale;
        }
    }
}

static void softmax(float *scores, int64_t length) {
    float highest = -INFINITY, total = 0;
    for (int64_t t = 0; t < length; t++)
        if (scores[t] > highest) highest = scores[t];
    int64_t t = 0;
    vf sums = {0};
    for (; t + LANES <= length; t += LANES) {
        vf value = vexp(load(scores + t) - highest);
        store(scores + t, value);
        sums += value;
    }
    total = sum(sums);
    for (; t < length; t++) total += scores[t] = expf(scores[t] - highest);
    float scale = 1.0f / total;
    for (t = 0; t < length; t++) scores[t] *= scale;
}

#define WIDE 4  // vectors of a value block

// out [heads][V] = sum over t of scores * row[:V]
static inline __attribute__((always_inline)) void gather_values(const Rows *rows, const float *scores, int64_t heads, int64_t length, int64_t V, float *out) {
    int64_t first = 0;
    for (; first + WIDE * LANES <= V; first += WIDE * LANES) {
        vf acc[HEADS][WIDE] = {0};
        for (int64_t t = 0; t < length; t++) {
            const float *row = row_of(rows, t) + first;
            for (int64_t h = 0; h < heads; h++) {
                float p = scores[h * length + t];
                for (int c = 0; c < WIDE; c++) acc[h][c] += p * load(row + c * LANES);
            }
        }
        for (int64_t h = 0; h < heads; h++)
            for (int c = 0; c < WIDE; c++) store(out + h * V + first + c * LANES, acc[h][c]);
    }
    for (int64_t h = 0; h < heads; h++)
        for (int64_t i = first; i < V; i++) {
            float total = 0;
            for (int64_t t = 0; t < length; t++) total += scores[h * length + t] * row_of(rows, t)[i];
            out[h * V + i] = total;
        }
}

// One block of heads of one sequence; inlined once with a constant number of heads, so that their sums stay in registers.
static inline __attribute__((always_inline)) void attend(const Rows *rows, const float *query, int64_t heads, int64_t length, int64_t V,
                                                         float scale, float *scores, float *out) {
    score(rows, query, heads, length, scale, scores);
    for (int64_t h = 0; h < heads; h++) softmax(scores + h * length, length);
    gather_values(rows, scores, heads, length, V, out);
}

// query [B, N, D], pool rows of D floats, page_table [B, P], seq_lens [B] -> out [B, N, V]. A query's result depends on its own
// sequence alone. `scratch`: threads * HEADS * longest floats of room.
void mla_decode(const float *query, const float *pool, const int64_t *page_table, const int64_t *seq_lens, int64_t B, int64_t N,
                int64_t D, int64_t V, int64_t P, int64_t page_size, float scale, float *out, float *scratch, int64_t longest,
                int threads) {
    int64_t blocks = (N + HEADS - 1) / HEADS, next = 0;
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1 && B * N * longest > 512)
    for (int thread = 0; thread < threads; thread++) {
        float *scores = scratch + thread * HEADS * longest;
        for (;;) {
            int64_t task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
            if (task >= B * blocks) break;
            int64_t b = task / blocks, head = task % blocks * HEADS, heads = N - head < HEADS ? N - head : HEADS;
            Rows rows = {pool, page_table + b * P, page_size, D};
            const float *own = query + (b * N + head) * D;
            float *to = out + (b * N + head) * V;
            if (heads == HEADS)
                attend(&rows, own, HEADS, seq_lens[b], V, scale, scores, to);
            else
                attend(&rows, own, heads, seq_lens[b], V, scale, scores, to);
        }
    }
}
