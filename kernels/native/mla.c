// MLA on one step's rows: rotary embedding, the latent KV write, and decode in absorbed form straight over the pages.
#include <math.h>
#include <string.h>

#include "attention.h"

#define HEADS 4                 // heads that share one reading of a latent row
#define TOKENS (LANES / HEADS)  // rows whose scores with these heads fill one vector

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

// Lane j of a pair of vectors folded by `width`: the first of the two lanes whose sum it becomes (those of the second vector from LANES on).
#define LANE(j, width) ((j) & (width) ? LANES + (j) - (width) : (j))
#define FOUR(j, width) LANE(j, width), LANE(j + 1, width), LANE(j + 2, width), LANE(j + 3, width)
#define ALL(width) {FOUR(0, width), FOUR(4, width), FOUR(8, width), FOUR(12, width)}
static const int32_t FOLD1[16] = ALL(1), FOLD2[16] = ALL(2), FOLD4[16] = ALL(4), FOLD8[16] = ALL(8);

// Lane j of the result is the sum over the lanes of acc[j].
ALWAYS_INLINE vf fold_all(vf *acc) {
    _Pragma("GCC unroll 4") for (int width = LANES / 2; width; width /= 2)
        _Pragma("GCC unroll 8") for (int i = 0; i < width; i++) {
            vi mine = *(const vi *)(width == 8 ? FOLD8 : width == 4 ? FOLD4 : width == 2 ? FOLD2 : FOLD1), other = mine + width;
            acc[i] = shuffle(acc[i], acc[i + width], mine) + shuffle(acc[i], acc[i + width], other);
        }
    return acc[0];
}

// scores [heads][stride] = query . row, TOKENS rows at a time, whose sums with the heads are folded into one vector. The last rows are
// padded with copies of the last.
ALWAYS_INLINE void score(const float **rows, const float *query, int64_t D, const int heads, int64_t length, float *scores, int64_t stride) {
    for (int64_t t = 0; t < length; t += TOKENS) {
        const float *own[TOKENS];
        vf acc[LANES] = {0};
        for (int j = 0; j < TOKENS; j++) own[j] = rows[t + j < length ? t + j : length - 1];
        int64_t i = 0;
        for (; i + LANES <= D; i += LANES)
            for (int j = 0; j < TOKENS; j++) {
                vf value = load(own[j] + i);
                for (int h = 0; h < heads; h++) acc[h * TOKENS + j] += value * load(query + h * D + i);
            }
        vf totals = fold_all(acc);
        for (int h = 0; h < heads; h++) memcpy(scores + h * stride + t, (float *)&totals + h * TOKENS, sizeof(float) * TOKENS);
        for (; i < D; i++)
            for (int h = 0; h < heads; h++)
                for (int j = 0; j < TOKENS; j++) scores[h * stride + t + j] += own[j][i] * query[h * D + i];
    }
}

// out [heads][V] = sum over t of scores * row[:V]
ALWAYS_INLINE void gather_values(const float **rows, const float *scores, int64_t stride, const int heads, int64_t length, int64_t V, float *out) {
    int64_t first = 0;
    for (; first + WIDE * LANES <= V; first += WIDE * LANES) {
        vf acc[HEADS][WIDE] = {0};
        for (int64_t t = 0; t < length; t++) {
            const float *row = rows[t] + first;
            for (int h = 0; h < heads; h++) {
                float p = scores[h * stride + t];
                for (int c = 0; c < WIDE; c++) acc[h][c] += p * load(row + c * LANES);
            }
        }
        for (int h = 0; h < heads; h++)
            for (int c = 0; c < WIDE; c++) store(out + h * V + first + c * LANES, acc[h][c]);
    }
    for (int h = 0; h < heads; h++)
        for (int64_t i = first; i < V; i++) {
            float total = 0;
            for (int64_t t = 0; t < length; t++) total += scores[h * stride + t] * rows[t][i];
            out[h * V + i] = total;
        }
}

// One block of heads of one sequence; inlined once with a constant number of heads, so that their sums stay in registers.
ALWAYS_INLINE void attend(const float **rows, const float *query, int64_t D, const int heads, int64_t length, int64_t V, float scale,
                          float *scores, int64_t stride, float *out) {
    score(rows, query, D, heads, length, scores, stride);
    for (int h = 0; h < heads; h++) softmax(scores + h * stride, length, scale);
    gather_values(rows, scores, stride, heads, length, V, out);
}

// query [B, N, D], pool rows of D floats, page_table [B, P], seq_lens [B] -> out [B, N, V]. A query's result depends on its own
// sequence alone. Room: `scores` threads * HEADS * (longest + LANES) floats, `rows` threads * longest
// pointers, where longest = P * page_size.
void mla_decode(const float *query, const float *pool, const int64_t *page_table, const int64_t *seq_lens, int64_t B, int64_t N,
                int64_t D, int64_t V, int64_t P, int64_t page_size, float scale, float *out, float *scores, const float **rows,
                int threads) {
    int64_t blocks = (N + HEADS - 1) / HEADS, longest = P * page_size, stride = longest + LANES, next = 0;
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1 && B * N * longest > 512)
    for (int thread = 0; thread < threads; thread++) {
        float *own_scores = scores + thread * HEADS * stride;
        const float **own_rows = rows + thread * longest;
        for (;;) {
            int64_t task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
            if (task >= B * blocks) break;
            int64_t b = task / blocks, head = task % blocks * HEADS, heads = N - head < HEADS ? N - head : HEADS;
            const float *own = query + (b * N + head) * D;
            float *to = out + (b * N + head) * V;
            for (int64_t page = 0, t = 0; t < seq_lens[b]; page++)
                for (int64_t i = 0; i < page_size && t < seq_lens[b]; i++, t++)
                    own_rows[t] = pool + (page_table[b * P + page] * page_size + i) * D;
            switch (heads) {
                case 1: attend(own_rows, own, D, 1, seq_lens[b], V, scale, own_scores, stride, to); break;
                case 2: attend(own_rows, own, D, 2, seq_lens[b], V, scale, own_scores, stride, to); break;
                case 3: attend(own_rows, own, D, 3, seq_lens[b], V, scale, own_scores, stride, to); break;
                default: attend(own_rows, own, D, HEADS, seq_lens[b], V, scale, own_scores, stride, to);
            }
        }
    }
}
