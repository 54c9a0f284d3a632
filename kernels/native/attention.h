// What decode and prefill share.
#ifndef MOESAIC_ATTENTION_H
#define MOESAIC_ATTENTION_H

#include <math.h>

#include "product.h"

// scores [length] in place -> softmax(scale * scores). Reads and writes (as 0) up to a vector beyond the end.
static void softmax(float *scores, int64_t length, float scale) {
    float highest = largest(scores, length);
    vf sums = {0};
    for (int64_t t = 0; t < length; t += LANES) {
        vf value = vexp((load(scores + t) - highest) * scale);
        if (length - t < LANES)
            value = choose(*(const vi *)LANE_NUMBERS < (int32_t)(length - t), value, (vf){0});
        store(scores + t, value);
        sums += value;
    }
    float inverse = 1.0f / sum(sums);
    for (int64_t t = 0; t < length; t += LANES) store(scores + t, load(scores + t) * inverse);
}

#endif
