/* A quantized layer on a CPU, in the order of operations of integers.py: what surrounds an integer product, one pass each
 * over the data, and a whole layer with a product of its own.
 *
 * Compiled on the machine it runs on, by cpu.py. No floating-point contraction: results are those of the torch ops. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bfloat16;

static inline float from_bfloat16(bfloat16 value) {
  uint32_t bits = (uint32_t)value << 16;
  float result;
  memcpy(&result, &bits, 4);
  return result;
}

static inline bfloat16 to_bfloat16(float value) { /* to nearest, ties to even; NaN does not occur here */
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return (bfloat16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#define IDENTITY(x) (x)
#define SIMD _Pragma("omp simd")
#define PARALLEL _Pragma("omp parallel for schedule(static)")

/* One row of integers.quantize_tokens; smooth may be null. TOKEN holds the integer plus SHIFT. */
#define QUANTIZED(VALUE, TOKEN, SHIFT)                                                                                 \
  float low = 0, high = 0, taint = 0; /* NaN and infinity must not vanish: no comparison holds for a NaN */            \
  _Pragma("omp simd reduction(min : low) reduction(max : high) reduction(+ : taint)")                                  \
  for (int64_t i = 0; i < columns; i++) {                                                                              \
    float value = VALUE;                                                                                               \
    taint += value * 0.0f;                                                                                             \
    low = value < low ? value : low;                                                                                   \
    high = value > high ? value : high;                                                                                \
  }                                                                                                                    \
  float scale = (high - low) * (float)(1.0 / 255);                                                                     \
  scale = (scale < 1e-12f ? 1e-12f : scale) + taint;                                                                   \
  float inverse = 1.0f / scale, zero = rintf(-128.0f - low * inverse);                                                 \
  *scale_of_row = scale;                                                                                               \
  *zero_of_row = (int32_t)zero;                                                                                        \
  SIMD for (int64_t i = 0; i < columns; i++) {                                                                         \
    float value = rintf(VALUE * inverse) + zero;                                                                       \
    value = value < -128.0f ? -128.0f : value;                                                                         \
    value = value > 127.0f ? 127.0f : value;                                                                           \
    out[i] = (TOKEN)((int32_t)value + SHIFT);                                                                          \
  }

#define QUANTIZE_ROW(NAME, TYPE, LOAD, TOKEN, SHIFT)                                                                   \
  static inline void NAME(const TYPE *restrict in, const float *restrict smooth, TOKEN *restrict out,                  \
                          float *scale_of_row, int32_t *zero_of_row, int64_t columns) {                                \
    if (smooth) {                                                                                                      \
      QUANTIZED(LOAD(in[i]) * smooth[i], TOKEN, SHIFT)                                                                 \
    } else {                                                                                                           \
      QUANTIZED(LOAD(in[i]), TOKEN, SHIFT)                                                                             \
    }                                                                                                                  \
  }

#define QUANTIZE_TOKENS(NAME, TYPE, LOAD)                                                                              \
  QUANTIZE_ROW(NAME##_row, TYPE, LOAD, int8_t, 0)                                                                      \
  void NAME(const TYPE *restrict values, const float *restrict smooth, int8_t *restrict quantized,                     \
            float *restrict scales, int32_t *restrict zeros, int64_t rows, int64_t columns) {                          \
    PARALLEL for (int64_t row = 0; row < rows; row++)                                                                  \
      NAME##_row(values + row * columns, smooth, quantized + row * columns, scales + row, zeros + row, columns);       \
  }
QUANTIZE_TOKENS(quantize_tokens_float32, float, IDENTITY)
QUANTIZE_TOKENS(quantize_tokens_bfloat16, bfloat16, from_bfloat16)

/* x * sigmoid(2u), which is gelu's tanh form; e to the -2u from a power of two and a polynomial */
static inline float gelu(float x) {
  float power = -x * (1.5957691216f + 0.0713548163f * (x * x));
  power = power < -87.0f ? -87.0f : power;
  power = power > 87.0f ? 87.0f : power;
  float whole = rintf(power * 1.44269504f), rest = power - whole * 0.693145752f - whole * 1.42860677e-6f;
  float series = 1.0f + rest * (1.0f + rest * (0.5f + rest * (1.66666667e-1f + rest * (4.16666667e-2f +
                 rest * (8.33333333e-3f + rest * 1.38888889e-3f)))));
  int32_t bits = ((int32_t)whole + 127) << 23;
  float scale;
  memcpy(&scale, &bits, 4);
  return x / (1.0f + series * scale);
}

/* Some columns of a row of integers.rescale; bias may be null */
#define RESCALED(AFTER, STORE, BIAS)                                                                                   \
  SIMD for (int64_t i = 0; i < columns; i++) out[i] =                                                                  \
      STORE(AFTER((float)(in[i] - zero * weight_sum[i]) * (scale * weight_scale[i]) BIAS));

#define RESCALE(NAME, TYPE, LOAD, STORE)                                                                               \
  static inline void NAME##_row(const int32_t *restrict in, float scale, int32_t zero,                                 \
                                const float *restrict weight_scale, const int32_t *restrict weight_sum,                \
                                const TYPE *restrict bias, TYPE *restrict out, int64_t columns, int64_t with_gelu) {   \
    if (bias && with_gelu) {                                                                                           \
      RESCALED(gelu, STORE, +LOAD(bias[i]))                                                                            \
    } else if (bias) {                                                                                                 \
      RESCALED(IDENTITY, STORE, +LOAD(bias[i]))                                                                        \
    } else if (with_gelu) {                                                                                            \
      RESCALED(gelu, STORE, )                                                                                          \
    } else {                                                                                                           \
      RESCALED(IDENTITY, STORE, )                                                                                      \
    }                                                                                                                  \
  }                                                                                                                    \
  void NAME(const int32_t *restrict product, const float *restrict scales, const int32_t *restrict zeros,              \
            const float *restrict weight_scale, const int32_t *restrict weight_sum, const TYPE *restrict bias,         \
            TYPE *restrict output, int64_t rows, int64_t columns, int64_t with_gelu) {                                 \
    PARALLEL for (int64_t row = 0; row < rows; row++)                                                                  \
      NAME##_row(product + row * columns, scales[row], zeros[row], weight_scale, weight_sum, bias,                     \
                 output + row * columns, columns, with_gelu);                                                          \
  }
RESCALE(rescale_float32, float, IDENTITY, IDENTITY)
RESCALE(rescale_bfloat16, bfloat16, from_bfloat16, to_bfloat16)

/* One group of packed int4: the first half of its columns in the low half bytes, the second in the high ones. */
#define UNPACK(TYPE, packed, scale, out, half)                                                                         \
  SIMD for (int64_t i = 0; i < (half); i++) {                                                                          \
    (out)[i] = (TYPE)((((packed)[i] & 15) - 8) * (scale));                                                             \
    (out)[(half) + i] = (TYPE)((((packed)[i] >> 4) - 8) * (scale));                                                    \
  }

/* integers.expand_int4; columns is a multiple of the group here */
void expand_int4(const uint8_t *restrict packed, const int8_t *restrict group_scale, int8_t *restrict weight,
                 int64_t rows, int64_t groups, int64_t half) {
  PARALLEL for (int64_t group = 0; group < rows * groups; group++) {
    const uint8_t *in = packed + group * half;
    int8_t *out = weight + group * 2 * half, scale = group_scale[group];
    UNPACK(int8_t, in, scale, out, half)
  }
}

enum { BLOCK = 1024 }; /* columns of a weight row that are turned to float at a time; they stay in the first cache */

typedef float lanes __attribute__((vector_size(64), aligned(4), may_alias));

/* Four sums at a time, which hides the latency of an addition. */
static inline float dot(const float *restrict left, const float *restrict right, int64_t size) {
  lanes a = {0}, b = {0}, c = {0}, d = {0};
  int64_t i = 0;
  for (; i + 64 <= size; i += 64) {
    a += *(const lanes *)(left + i) * *(const lanes *)(right + i);
    b += *(const lanes *)(left + i + 16) * *(const lanes *)(right + i + 16);
    c += *(const lanes *)(left + i + 32) * *(const lanes *)(right + i + 32);
    d += *(const lanes *)(left + i + 48) * *(const lanes *)(right + i + 48);
  }
  a += b + c + d;
  float sum = 0;
  for (int lane = 0; lane < 16; lane++) sum += a[lane];
  for (; i < size; i++) sum += left[i] * right[i];
  return sum;
}

/* Few rows of float activations times an integer weight: output (rows, out), not yet rounded to the model's dtype.
 * group_scale is null for int8 weights; with it, weight holds packed int4 and group divides BLOCK. */
void few_rows(const float *restrict values, const void *restrict weight, const int8_t *restrict group_scale,
              const float *restrict weight_scale, const float *restrict bias, float *restrict output, int64_t rows,
              int64_t columns, int64_t outputs, int64_t group) {
  int64_t groups = group_scale ? (columns + group - 1) / group : 0;
  PARALLEL for (int64_t channel = 0; channel < outputs; channel++) {
    float block[BLOCK];
    for (int64_t row = 0; row < rows; row++) output[row * outputs + channel] = 0;
    for (int64_t start = 0; start < columns; start += BLOCK) {
      int64_t size = columns - start < BLOCK ? columns - start : BLOCK;
      if (group_scale) {
        const uint8_t *in = (const uint8_t *)weight + channel * groups * (group / 2) + start / 2;
        const int8_t *scales = group_scale + channel * groups + start / group;
        for (int64_t g = 0; g * group < size; g++) {
          const uint8_t *packed = in + g * (group / 2);
          float *out = block + g * group;
          UNPACK(float, packed, scales[g], out, group / 2)
        }
      } else {
        const int8_t *in = (const int8_t *)weight + channel * columns + start;
        SIMD for (int64_t i = 0; i < size; i++) block[i] = (float)in[i];
      }
      for (int64_t row = 0; row < rows; row++)
        output[row * outputs + channel] += dot(values + row * columns + start, block, size);
    }
    for (int64_t row = 0; row < rows; row++) {
      float *out = output + row * outputs + channel;
      *out = *out * weight_scale[channel] + (bias ? bias[channel] : 0.0f);
    }
  }
}

/* A whole layer. Tokens are quantized once. A panel of the weight, so many output channels, is reordered so that one load
 * has DEPTH columns of all of them, and stays in the second cache; a token's DEPTH columns are broadcast and multiplied
 * with it, TILE tokens at a time, and what is summed up is scaled and stored while it is in the first cache.
 *
 * Products of int8 are added in 32 bits, four at a time where the CPU can (its tokens are unsigned, so 128 is added, and
 * taken back as a part of the zero point), else two at a time in a wider type. Without either, C: the compiler may know
 * better. */
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512VNNI__)
enum { LANES = 16, DEPTH = 4, TILE = 12, SHIFT = 128 };
typedef uint8_t token;
typedef int8_t factor;
#define ADD_PRODUCTS(sum, tokens, factors)                                                                             \
  (sums)_mm512_dpbusd_epi32((__m512i)(sum), (__m512i)(tokens), (__m512i)(factors))
#elif defined(__AVXVNNI__)
enum { LANES = 8, DEPTH = 4, TILE = 6, SHIFT = 128 };
typedef uint8_t token;
typedef int8_t factor;
#define ADD_PRODUCTS(sum, tokens, factors)                                                                             \
  (sums)_mm256_dpbusd_avx_epi32((__m256i)(sum), (__m256i)(tokens), (__m256i)(factors))
#elif defined(__AVX2__)
enum { LANES = 8, DEPTH = 2, TILE = 6, SHIFT = 0 };
typedef int16_t token, factor;
#define ADD_PRODUCTS(sum, tokens, factors) (sum) + (sums)_mm256_madd_epi16((__m256i)(tokens), (__m256i)(factors))
#else
enum { LANES = 8, DEPTH = 4, TILE = 6, SHIFT = 0 };
typedef int8_t token, factor;
#define ADD_PRODUCTS add_products
#endif

typedef int32_t sums __attribute__((vector_size(4 * LANES)));

/* where none of these instructions is there */
static inline sums add_products(sums sum, sums tokens, sums factors) {
  int8_t left[4 * LANES], right[4 * LANES];
  memcpy(left, &tokens, sizeof left);
  memcpy(right, &factors, sizeof right);
  for (int i = 0; i < 4 * LANES; i++) sum[i / 4] += left[i] * right[i];
  return sum;
}

enum { PANEL = 2 * LANES, NEAR = 1 << 20 }; /* output channels at a time; bytes of tokens that stay near a core */

/* integers.expand_int4 or int8 weights, of output channels from first on: panel (columns / DEPTH, PANEL, DEPTH), zero
 * where there is no channel or column; one row of factors is scratch */
static inline void fill_panel(const void *restrict weight, const int8_t *restrict group_scale, factor *restrict row,
                              factor *restrict panel, int64_t first, int64_t outputs, int64_t columns, int64_t stride,
                              int64_t group) {
  int64_t groups = group_scale ? (columns + group - 1) / group : 0;
  for (int64_t lane = 0; lane < PANEL; lane++) {
    int64_t channel = first + lane;
    if (channel >= outputs) {
      memset(row, 0, columns * sizeof(factor));
    } else if (group_scale) {
      for (int64_t g = 0; g < groups; g++) {
        const uint8_t *packed = (const uint8_t *)weight + (channel * groups + g) * (group / 2);
        factor *out = row + g * group;
        UNPACK(factor, packed, group_scale[channel * groups + g], out, group / 2)
      }
    } else {
      const int8_t *in = (const int8_t *)weight + channel * columns;
      SIMD for (int64_t i = 0; i < columns; i++) row[i] = in[i];
    }
    memset(row + columns, 0, (stride - columns) * sizeof(factor));
    int32_t word;
    for (int64_t i = 0; i < stride; i += DEPTH) {
      memcpy(&word, row + i, 4);
      memcpy(panel + i * PANEL + lane * DEPTH, &word, 4);
    }
  }
}

/* Sums of TILE tokens with one panel */
static inline void multiply_tile(const token *restrict tokens, const factor *restrict panel, int64_t stride,
                                 int32_t (*restrict product)[PANEL]) {
  sums all[TILE][2] = {{{0}}};
  for (int64_t i = 0; i < stride; i += DEPTH) {
    sums left, right;
    memcpy(&left, panel + i * PANEL, sizeof left);
    memcpy(&right, panel + i * PANEL + LANES * DEPTH, sizeof right);
    _Pragma("GCC unroll 12") for (int row = 0; row < TILE; row++) {
      int32_t word;
      memcpy(&word, tokens + row * stride + i, 4);
      sums same = word - (sums){0};
      all[row][0] = ADD_PRODUCTS(all[row][0], same, left);
      all[row][1] = ADD_PRODUCTS(all[row][1], same, right);
    }
  }
  memcpy(product, all, sizeof all);
}

/* Returns whether there was memory for it. group_scale is null for int8 weights, smooth and bias may be. */
#define LINEAR(NAME, TYPE, LOAD, RESCALE_ROW)                                                                          \
  QUANTIZE_ROW(NAME##_row, TYPE, LOAD, token, SHIFT)                                                                   \
  int64_t NAME(const TYPE *restrict values, const float *restrict smooth, const void *restrict weight,                 \
               const int8_t *restrict group_scale, const float *restrict weight_scale,                                 \
               const int32_t *restrict weight_sum, const TYPE *restrict bias, TYPE *restrict output, int64_t rows,     \
               int64_t columns, int64_t outputs, int64_t group, int64_t with_gelu) {                                   \
    int64_t wide = group_scale ? (columns + group - 1) / group * group : columns;                                      \
    int64_t stride = (wide + DEPTH - 1) / DEPTH * DEPTH, tiles = (rows + TILE - 1) / TILE;                             \
    int64_t at_once = NEAR / (stride * (int64_t)sizeof(token) * TILE) + 1, chunks = (tiles + at_once - 1) / at_once;   \
    int64_t panels = (outputs + PANEL - 1) / PANEL;                                                                    \
    token *tokens = calloc(tiles * TILE * stride, sizeof(token));                                                      \
    float *scales = malloc(rows * sizeof(float));                                                                      \
    int32_t *zeros = malloc(rows * sizeof(int32_t));                                                                   \
    int64_t enough = tokens && scales && zeros;                                                                        \
    if (enough) {                                                                                                      \
      PARALLEL for (int64_t row = 0; row < rows; row++)                                                                \
        NAME##_row(values + row * columns, smooth, tokens + row * stride, scales + row, zeros + row, columns);         \
      _Pragma("omp parallel reduction(&& : enough)") {                                                                 \
        /* whole cache lines, and a row of scratch behind them */                                                      \
        factor *panel = aligned_alloc(64, ((PANEL + 1) * stride * sizeof(factor) + 63) / 64 * 64);                     \
        enough = panel != NULL;                                                                                        \
        _Pragma("omp for schedule(dynamic)") for (int64_t task = 0; task < chunks * panels; task++) {                  \
          if (!panel) continue;                                                                                        \
          int64_t first = task % panels * PANEL, from = task / panels * at_once;                                       \
          int64_t to = from + at_once < tiles ? from + at_once : tiles;                                                \
          int64_t lanes = outputs - first < PANEL ? outputs - first : PANEL;                                           \
          fill_panel(weight, group_scale, panel + PANEL * stride, panel, first, outputs, columns, stride, group);      \
          for (int64_t tile = from; tile < to; tile++) {                                                               \
            int32_t product[TILE][PANEL];                                                                              \
            multiply_tile(tokens + tile * TILE * stride, panel, stride, product);                                      \
            for (int64_t row = tile * TILE; row < rows && row < (tile + 1) * TILE; row++)                              \
              RESCALE_ROW(product[row - tile * TILE], scales[row], zeros[row] + SHIFT, weight_scale + first,           \
                          weight_sum + first, bias ? bias + first : NULL, output + row * outputs + first, lanes,       \
                          with_gelu);                                                                                  \
          }                                                                                                            \
        }                                                                                                              \
        free(panel);                                                                                                   \
      }                                                                                                                \
    }                                                                                                                  \
    free(tokens);                                                                                                      \
    free(scales);                                                                                                      \
    free(zeros);                                                                                                       \
    return enough;                                                                                                     \
  }
LINEAR(linear_float32, float, IDENTITY, rescale_float32_row)
LINEAR(linear_bfloat16, bfloat16, from_bfloat16, rescale_bfloat16_row)
