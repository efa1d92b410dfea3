/* What surrounds the integer product on a CPU: one pass each over the data, in the order of operations of integers.py.
 *
 * Compiled on the machine it runs on, by cpu.py. No floating-point contraction: results are those of the torch ops. */
#include <math.h>
#include <stdint.h>
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

/* integers.quantize_tokens; smooth may be null */
#define QUANTIZE_ROW(VALUE)                                                                                            \
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
  scales[row] = scale;                                                                                                 \
  zeros[row] = (int32_t)zero;                                                                                          \
  SIMD for (int64_t i = 0; i < columns; i++) {                                                                         \
    float value = rintf(VALUE * inverse) + zero;                                                                       \
    value = value < -128.0f ? -128.0f : value;                                                                         \
    value = value > 127.0f ? 127.0f : value;                                                                           \
    out[i] = (int8_t)(int32_t)value;                                                                                   \
  }

#define QUANTIZE_TOKENS(NAME, TYPE, LOAD)                                                                              \
  void NAME(const TYPE *restrict values, const float *restrict smooth, int8_t *restrict quantized,                     \
            float *restrict scales, int32_t *restrict zeros, int64_t rows, int64_t columns) {                          \
    PARALLEL for (int64_t row = 0; row < rows; row++) {                                                                \
      const TYPE *in = values + row * columns;                                                                         \
      int8_t *out = quantized + row * columns;                                                                         \
      if (smooth) {                                                                                                    \
        QUANTIZE_ROW(LOAD(in[i]) * smooth[i])                                                                          \
      } else {                                                                                                         \
        QUANTIZE_ROW(LOAD(in[i]))                                                                                      \
      }                                                                                                                \
    }                                                                                                                  \
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

/* integers.rescale; bias may be null */
#define RESCALE_ROW(AFTER, STORE, BIAS)                                                                                \
  SIMD for (int64_t i = 0; i < columns; i++) out[i] =                                                                  \
      STORE(AFTER((float)(in[i] - zero * weight_sum[i]) * (scale * weight_scale[i]) BIAS));

#define RESCALE(NAME, TYPE, LOAD, STORE)                                                                               \
  void NAME(const int32_t *restrict product, const float *restrict scales, const int32_t *restrict zeros,              \
            const float *restrict weight_scale, const int32_t *restrict weight_sum, const TYPE *restrict bias,         \
            TYPE *restrict output, int64_t rows, int64_t columns, int64_t with_gelu) {                                 \
    PARALLEL for (int64_t row = 0; row < rows; row++) {                                                                \
      const int32_t *in = product + row * columns;                                                                     \
      TYPE *out = output + row * columns;                                                                              \
      float scale = scales[row];                                                                                       \
      int32_t zero = zeros[row];                                                                                       \
      if (bias && with_gelu) {                                                                                         \
        RESCALE_ROW(gelu, STORE, +LOAD(bias[i]))                                                                       \
      } else if (bias) {                                                                                               \
        RESCALE_ROW(IDENTITY, STORE, +LOAD(bias[i]))                                                                   \
      } else if (with_gelu) {                                                                                          \
        RESCALE_ROW(gelu, STORE, )                                                                                     \
      } else {                                                                                                         \
        RESCALE_ROW(IDENTITY, STORE, )                                                                                 \
      }                                                                                                                \
    }                                                                                                                  \
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
