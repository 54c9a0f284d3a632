// Operations that go row by row over activations: norms, SwiGLU, the weighted sum of expert rows.
#include <math.h>

#include "simd.h"

#define MANY 16384  // elements from which a second thread pays

static void norm_row(const float *x, const float *weight, int64_t H, float eps, float *out) {
    float scale = 1.0f / sqrtf(dot(x, x, H) / (float)H + eps);
    for (int64_t i = 0; i < H; i++) out[i] = x[i] * scale * weight[i];
}

// x [rows, H] with row stride `stride` -> out [rows, H].
void rms_norm(const float *x, int64_t stride, const float *weight, int64_t rows, int64_t H, float eps, float *out, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * H > MANY)
    for (int64_t r = 0; r < rows; r++) norm_row(x + r * stride, weight, H, eps, out + r * H);
}

// total = x + residual, out = norm(total), all [rows, H].
void add_rms_norm(const float *x, const float *residual, const float *weight, int64_t rows, int64_t H, float eps, float *out,
                  float *total, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * H > MANY)
    for (int64_t r = 0; r < rows; r++) {
        float *own = total + r * H;
        for (int64_t i = 0; i < H; i++) own[i] = x[r * H + i] + residual[r * H + i];
        norm_row(own, weight, H, eps, out + r * H);
    }
}

// gate_up [rows, 2 * I], gate first -> out [rows, I].
void swiglu(const float *gate_up, int64_t rows, int64_t I, float *out, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * I > MANY)
    for (int64_t r = 0; r < rows; r++) {
        const float *gate = gate_up + r * 2 * I, *up = gate + I;
        int64_t i = 0;
        for (; i + LANES <= I; i += LANES) {
            vf g = load(gate + i);
            store(out + r * I + i, g / (1.0f + vexp(-g)) * load(up + i));
        }
        for (; i < I; i++) out[r * I + i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
    }
}

// rows [*, H], row [T, K] (negative: the choice lies elsewhere), weights [T, K] -> out [T, H], summed in the order of K.
void weighted_rows(const float *rows, const int64_t *row, const float *weights, int64_t T, int64_t K, int64_t H, float *out,
                   int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && T * K * H > MANY)
    for (int64_t t = 0; t < T; t++) {
        float *own = out + t * H;
        for (int64_t i = 0; i < H; i++) own[i] = 0;
        for (int64_t k = 0; k < K; k++) {
            if (row[t * K + k] < 0) continue;
            const float *from = rows + row[t * K + k] * H;
            float weight = weights[t * K + k];
            for (int64_t i = 0; i < H; i++) own[i] += weight * from[i];
        }
    }
}
