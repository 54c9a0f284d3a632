// Vectors as wide as the machine has them, through GCC's and Clang's vector extensions (no intrinsics, any architecture).
#ifndef MOESAIC_SIMD_H
#define MOESAIC_SIMD_H

#include <stdint.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

typedef float vf __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static inline vf load(const float *p) { return *(const vf *)p; }
static inline void store(float *p, vf x) { *(vf *)p = x; }
static inline vf splat(float x) { return x - (vf){0}; }

static inline vf choose(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }

#if defined(__clang__)
static inline __attribute__((always_inline)) vf shuffle(vf a, vf b, vi from) {
    vf out;
    for (int i = 0; i < LANES; i++) out[i] = from[i] < LANES ? a[from[i]] : b[from[i] - LANES];
    return out;
}
#else
#define shuffle(a, b, from) __builtin_shuffle(a, b, from)  // lanes of a, then of b
#endif

static inline float sum(vf x) {
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) x[i] += x[i + width];
    return x[0];
}

static const int32_t LANE_NUMBERS[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

static inline float largest(const float *x, int64_t n) {
    float found = x[0];
    int64_t i = 0;
    if (n >= LANES) {
        vf lanes = load(x);
        for (i = LANES; i + LANES <= n; i += LANES) lanes = choose(load(x + i) > lanes, load(x + i), lanes);
        for (int lane = 0; lane < LANES; lane++) found = lanes[lane] > found ? lanes[lane] : found;
    }
    for (; i < n; i++) found = x[i] > found ? x[i] : found;
    return found;
}

// e^x to about 1 ulp for x in [-87, 88], clamped outside: 2^n * e^r with |r| <= ln(2) / 2 (Cephes' polynomial).
static inline vf vexp(vf x) {
    const vf low = splat(-87.0f), high = splat(88.0f), magic = splat(12582912.0f);
    x = choose(x < low, low, choose(x > high, high, x));
    vf shifted = x * 1.44269504088896341f + magic;
    vf n = shifted - magic;
    vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    vi exponent = ((vi)shifted - (vi)magic + 127) << 23;
    return p * (vf)exponent;
}

static inline float dot(const float *a, const float *b, int64_t n) {
    vf acc0 = {0}, acc1 = {0};
    int64_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
        acc0 += load(a + i) * load(b + i);
        acc1 += load(a + i + LANES) * load(b + i + LANES);
    }
    for (; i + LANES <= n; i += LANES) acc0 += load(a + i) * load(b + i);
    float total = sum(acc0 + acc1);
    for (; i < n; i++) total += a[i] * b[i];
    return total;
}

#endif
