/* Attention of a verify step on a CPU, float32, over the dense KV store: every input at its own length.
 *
 * A task is one KV head of one input. It writes the input's new keys and values, then attends in three passes
 * over the keys. The query rows that share the KV head (new tokens x grouped heads) are the lanes of a vector,
 * 16 at a time: scores and softmax then need no sums across lanes.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
#define KEYS 8  /* keys whose scores are summed up in registers */
#define ROWS 4  /* query rows whose outputs are */
#define WIDTH 4 /* vectors of an output: 64 values */
#define AHEAD 32 /* keys and values are prefetched so many tokens before their turn */

typedef float vec __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(64), aligned(4), may_alias));

static inline vec load(const float *p) { return *(const vec *)p; }
static inline vec all(float x) { return x - (vec){0}; }
static inline vec select_(ivec mask, vec a, vec b) { return (vec)(((ivec)a & mask) | ((ivec)b & ~mask)); }

/* exp(x) for x <= 0, to float32's precision: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes).
 * NaN stays NaN. */
static inline vec exp_(vec x) {
    ivec tiny = x <= all(-87.0f);
    vec bounded = select_(tiny, all(-87.0f), x);
    vec n = (bounded * 1.44269504f + 12582912.0f) - 12582912.0f;
    vec f = bounded - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = ((((1.9875691500e-4f * f + 1.3981999507e-3f) * f + 8.3334519073e-3f) * f + 4.1665795894e-2f) * f
             + 1.6666665459e-1f) * f + 5.0000001201e-1f;
    ivec power = (__builtin_convertvector(n, ivec) + 127) << 23;
    vec result = (p * f * f + f + 1.0f) * (vec)power;
    return (vec)((ivec)result & ~tiny);
}

/* scores[j][lane] of `length` keys; queries[d][lane]. */
static void score(const float *queries, const float *keys, int64_t length, int64_t dim, vec *scores) {
    int64_t j = 0;
    for (; j + KEYS <= length; j += KEYS) {
        const float *k = keys + j * dim;
        vec sum[KEYS] = {0};
        for (int64_t d = 0; d < dim; d++) {
            vec q = load(queries + d * LANES);
            if (d % 2 == 0) __builtin_prefetch(k + AHEAD * dim + d * KEYS);
#pragma GCC unroll 8
            for (int i = 0; i < KEYS; i++) sum[i] += q * k[i * dim + d];
        }
        for (int i = 0; i < KEYS; i++) scores[j + i] = sum[i];
    }
    for (; j < length; j++) {
        vec sum = {0};
        for (int64_t d = 0; d < dim; d++) sum += load(queries + d * LANES) * keys[j * dim + d];
        scores[j] = sum;
    }
}

/* out[i][c][lane of c]: weighted sums of `length` values for ROWS query rows, WIDTH vectors wide. */
static void weigh(const float *weights, const float *values, int64_t length, int64_t dim, vec out[ROWS][WIDTH]) {
    vec sum[ROWS][WIDTH] = {0};
    for (int64_t j = 0; j < length; j++) {
        const float *v = values + j * dim;
        for (int c = 0; c < WIDTH; c++) __builtin_prefetch(v + AHEAD * dim + c * LANES);
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; i++) {
            float w = weights[j * LANES + i];
#pragma GCC unroll 4
            for (int c = 0; c < WIDTH; c++) sum[i][c] += load(v + c * LANES) * w;
        }
    }
    memcpy(out, sum, sizeof sum);
}

struct strides { int64_t token, head; };

/* q, k, v: packed new tokens; out: (tokens, heads, dim). Per input: `first` packed token, `fresh` and `cached`
 * tokens, `capacity` of its row, addresses of its row of keys and of values, and of the (fresh, fresh) bytes that
 * tell which new tokens each new token sees, or 0: itself and those before. Returns 0, or 1 without memory. */
int wispprof_attend(const float *q, struct strides qs, const float *k, struct strides ks, const float *v,
                    struct strides vs, float *out, int64_t heads, int64_t kv_heads, int64_t dim, float scale,
                    int64_t inputs, const int64_t *first, const int64_t *fresh, const int64_t *cached,
                    const int64_t *capacity, const int64_t *key_rows, const int64_t *value_rows,
                    const int64_t *sees, int64_t longest, int threads) {
    const int64_t group = heads / kv_heads;
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        vec *scores = aligned_alloc(64, (size_t)longest * sizeof(vec));
        float *queries = aligned_alloc(64, (size_t)dim * LANES * sizeof(float));
        if (!scores || !queries) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < inputs * kv_heads; task++) {
            if (!scores || !queries) continue;
            const int64_t s = task / kv_heads, h = task % kv_heads;
            const int64_t new_ = fresh[s], old = cached[s], rows = new_ * group;
            float *keys = (float *)key_rows[s] + h * capacity[s] * dim;
            float *values = (float *)value_rows[s] + h * capacity[s] * dim;
            const uint8_t *seen = (const uint8_t *)sees[s];
            for (int64_t t = 0; t < new_; t++) {
                const int64_t token = first[s] + t;
                memcpy(keys + (old + t) * dim, k + token * ks.token + h * ks.head, dim * sizeof(float));
                memcpy(values + (old + t) * dim, v + token * vs.token + h * vs.head, dim * sizeof(float));
            }
            for (int64_t row = 0; row < rows; row += LANES) {
                const int64_t lanes = rows - row < LANES ? rows - row : LANES;
                const int64_t length = seen ? old + new_ : old + (row + lanes - 1) / group + 1;
                memset(queries, 0, (size_t)dim * LANES * sizeof(float));
                for (int64_t i = 0; i < lanes; i++) {
                    const float *from = q + (first[s] + (row + i) / group) * qs.token
                                        + (h * group + (row + i) % group) * qs.head;
                    for (int64_t d = 0; d < dim; d++) queries[d * LANES + i] = from[d] * scale;
                }
                score(queries, keys, length, dim, scores);
                for (int64_t j = old; j < length; j++)
                    for (int64_t i = 0; i < lanes; i++) {
                        const int64_t t = (row + i) / group;
                        if (seen ? !seen[t * new_ + j - old] : j - old > t) ((float *)&scores[j])[i] = -INFINITY;
                    }
                vec most = scores[0], total = {0};
                for (int64_t j = 1; j < length; j++) most = select_(scores[j] > most, scores[j], most);
                for (int64_t j = 0; j < length; j++) total += scores[j] = exp_(scores[j] - most);
                for (int64_t i = 0; i < lanes; i += ROWS)
                    for (int64_t d = 0; d < dim; d += WIDTH * LANES) {
                        vec sums[ROWS][WIDTH];
                        weigh((const float *)scores + i, values + d, length, dim, sums);
                        for (int64_t r = 0; r < ROWS && i + r < lanes; r++) {
                            const int64_t token = first[s] + (row + i + r) / group;
                            const int64_t head = h * group + (row + i + r) % group;
                            const float inverse = 1.0f / ((const float *)&total)[i + r];
                            float *to = out + (token * heads + head) * dim + d;
                            for (int c = 0; c < WIDTH; c++) {
                                vec scaled = sums[r][c] * inverse;
                                memcpy(to + c * LANES, &scaled, sizeof scaled);
                            }
                        }
                    }
            }
        }
        free(scores);
        free(queries);
    }
    return failed;
}
