// DeepSeek-V3's expert choice, one token after another: sigmoid, correction bias, group-limited top-k.
#include <math.h>
#include <stdlib.h>

#include "simd.h"

// What a NaN counts as: less than any score, but a candidate, so that a token's experts are distinct whatever its logits are.
#define LOWEST -1e30f

static int64_t best_of(const float *values, int64_t n) {
    float highest = largest(values, n);
    int64_t i = 0;
    while (i < n - 1 && values[i] != highest) i++;
    return i;
}

static void limit_to_groups(float *choice, int64_t E, int64_t num_groups, int64_t topk_groups, float *group_scores) {
    int64_t size = E / num_groups;
    for (int64_t g = 0; g < num_groups; g++) {
        float first = -INFINITY, second = -INFINITY;
        for (int64_t i = 0; i < size; i++) {
            float value = choice[g * size + i];
            if (value > first) {
                second = first;
                first = value;
            } else if (value > second) {
                second = value;
            }
        }
        group_scores[g] = first + second;
    }
    for (int64_t i = 0; i < topk_groups; i++) group_scores[best_of(group_scores, num_groups)] = -INFINITY;
    for (int64_t g = 0; g < num_groups; g++)
        if (group_scores[g] != -INFINITY)
            for (int64_t i = 0; i < size; i++) choice[g * size + i] = -INFINITY;
}

// logits [T, E], bias [E] -> ids [T, K] by falling choice score (the lower id first among equals), weights [T, K].
// `scratch`: threads * (2 * E + num_groups) floats of room.
void grouped_topk(const float *logits, const float *bias, int64_t T, int64_t E, int64_t num_groups, int64_t topk_groups, int64_t K,
                  int normalize, float scaling_factor, int64_t *ids, float *weights, float *scratch, int threads) {
    int64_t room = 2 * E + num_groups, share = (T + threads - 1) / threads;
#pragma omp parallel for num_threads(threads) if (threads > 1 && T * E > 2048)
    for (int thread = 0; thread < threads; thread++) {
        float *scores = scratch + thread * room, *choice = scores + E, *group_scores = choice + E;
        for (int64_t t = thread * share; t < T && t < (thread + 1) * share; t++) {
            const float *row = logits + t * E;
            int64_t i = 0;
            for (; i + LANES <= E; i += LANES) store(scores + i, 1.0f / (1.0f + vexp(-load(row + i))));
            for (; i < E; i++) scores[i] = 1.0f / (1.0f + expf(-row[i]));
            for (i = 0; i < E; i++) {
                float value = scores[i] + bias[i];
                choice[i] = value == value ? value : LOWEST;
            }
            if (topk_groups < num_groups) limit_to_groups(choice, E, num_groups, topk_groups, group_scores);
            float total = 0;
            for (int64_t k = 0; k < K; k++) {
                int64_t best = best_of(choice, E);
                choice[best] = -INFINITY;
                ids[t * K + k] = best;
                weights[t * K + k] = scores[best];
                total += scores[best];
            }
            float scale = normalize ? scaling_factor / (total + 1e-20f) : scaling_factor;
            for (int64_t k = 0; k < K; k++) weights[t * K + k] *= scale;
        }
    }
}

// A stable sort of n choices (K per token) by expert: ids [n] in [0, E), -1 lies elsewhere -> counts [E], row [n] of each choice among
// the sorted (0 where it lies elsewhere), tokens [number of choices here] of each row. Returns that number.
int64_t sort_choices(const int64_t *ids, int64_t n, int64_t K, int64_t E, int64_t *counts, int64_t *row, int64_t *tokens,
                     int64_t *next) {
    for (int64_t e = 0; e < E; e++) counts[e] = 0;
    for (int64_t i = 0; i < n; i++)
        if (ids[i] >= 0) counts[ids[i]]++;
    int64_t total = 0;
    for (int64_t e = 0; e < E; total += counts[e++]) next[e] = total;
    for (int64_t i = 0; i < n; i++) {
        row[i] = ids[i] >= 0 ? next[ids[i]]++ : 0;
        if (ids[i] >= 0) tokens[row[i]] = i / K;
    }
    return total;
}
