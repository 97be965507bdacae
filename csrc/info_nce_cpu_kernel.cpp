// The vectorised passes of the InfoNCE loss: each row of logits is read from the second-level cache once and stays in
// the first while it is turned into its statistics and its gradient.
#include "info_nce_cpu_kernel.h"

#include "cpu_vectors.h"

namespace avppc::AVPPC_CPU_NAMESPACE {
namespace {

constexpr float INFINITE = __builtin_inff();
constexpr float LOWEST = -3.402823466e38f;

typedef unsigned short vbfloat16 __attribute__((vector_size(CPU_LANES * sizeof(unsigned short))));

// Unsigned: sums in lanes whose result is not used may wrap round.
vuint bits(vfloat x) { return (vuint)x; }

vfloat larger(vfloat a, vfloat b) { return a > b ? a : b; }

float largest(vfloat x) {
  float result = x[0];
  for (int lane = 1; lane < CPU_LANES; ++lane) result = x[lane] > result ? x[lane] : result;
  return result;
}

// exp(x) for x <= about 80, within 2 units in the last place; 0 below -87.3, where floats become subnormal; NaN stays.
vfloat exponential(vfloat x) {
  constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the low bits
  const vint underflow = x < broadcast(-87.3f);
  const vfloat shifted = x * 1.44269504f + ROUND;
  const vfloat n = shifted - ROUND;
  // x - n log(2), log(2) in two parts, is within +-0.347; there the polynomial's relative error is 2.6e-9
  const vfloat f = x - n * 0.693359375f - n * -2.12194440e-4f;
  vfloat p = f * 1.406160442e-3f + 8.379106934e-3f;
  p = p * f + 4.166476934e-2f;
  p = p * f + 0.1666636418f;
  p = p * f + 0.5000000437f;
  p = p * f + 1.00000005f;
  p = p * f + 1.0f;
  const vuint exponent = (bits(shifted) - bits(broadcast(ROUND))) << 23;
  return underflow ? vfloat{} : (vfloat)(bits(p) + exponent);
}

vbfloat16 to_bfloat16(vfloat x) {
  const vuint i = bits(x);
  const vuint odd = (i >> 16) & 1;  // rounds to nearest, ties to even
  const vuint rounded = (i + 0x7fff + odd) >> 16;
  const vuint nan = vuint{} + 0x7fc0;  // rounded, a NaN with the highest bits set would be 0
  return __builtin_convertvector(x == x ? rounded : nan, vbfloat16);
}

// row[j..] = x as floats, or as the row's j-th bfloat16s; j only grows, so nothing unread is overwritten.
inline void store_gradient(float* row, int64_t j, vfloat x, int64_t lanes, Element type) {
  if (type == Element::float32) {
    store(row + j, x, lanes);
  } else {
    const vbfloat16 half = to_bfloat16(x);
    __builtin_memcpy(reinterpret_cast<uint16_t*>(row) + j, &half, lanes * sizeof(uint16_t));
  }
}

float row_maximum(const float* row, int64_t columns) {
  vfloat maximum = broadcast(-INFINITE);
  for_each_vector(columns, [&](int64_t j, int64_t lanes) {
    maximum = larger(load(row + j, lanes, -INFINITE), maximum);
  });
  return largest(maximum);
}

// row = exp(row - maximum) where STORE; returns the sum.
template <bool STORE>
float exponentials(float* row, int64_t columns, float maximum) {
  vfloat sum = {};
  for_each_vector(columns, [&](int64_t j, int64_t lanes) {
    const vfloat e = exponential(load(row + j, lanes, -INFINITE) - maximum);
    if (STORE) store(row + j, e, lanes);
    sum += e;
  });
  return total<float>(sum);
}

template <Element TYPE>
void rows(const LogitBlock& block, const LogSumExp& lse, float* loss, float* correct, const float* du) {
  for (int64_t r = 0; r < block.rows; ++r) {
    float* row = block.s + r * block.stride;
    const bool has_positive = block.positive >= 0;
    const int64_t p = block.positive + r;
    const float positive = has_positive ? row[p] : -INFINITE;
    if (has_positive) row[p] = -INFINITE;  // the passes below see the negatives alone
    const float negative = row_maximum(row, block.columns);
    float maximum = negative > positive ? negative : positive;
    if (maximum == -INFINITE) maximum = LOWEST;  // all left out: the sum is 0, the log-sum-exp -inf, not NaN
    const float negatives = du ? exponentials<true>(row, block.columns, maximum)
                               : exponentials<false>(row, block.columns, maximum);
    const float sum = negatives + __builtin_expf(positive - maximum);
    lse.maximum[r] = maximum;
    // where the positive is the largest the loss may be far smaller than 1: keep its digits
    lse.log_sum[r] = positive < maximum ? __builtin_logf(sum) : __builtin_log1pf(negatives);
    loss[r] = lse.log_sum[r] + (has_positive ? maximum - positive : maximum);
    correct[r] = positive > negative ? 1.0f : 0.0f;
    if (has_positive) row[p] = positive;
    if (du) {
      const float factor = du[r] / sum;
      for_each_vector(block.columns, [&](int64_t j, int64_t lanes) {
        store_gradient(row, j, load(row + j, lanes) * factor, lanes, TYPE);
      });
      if (has_positive) {
        store_gradient(row, p, broadcast(-factor * negatives), 1, TYPE);  // du (p - 1) without cancellation
      }
    }
  }
}

template <Element TYPE, bool COLUMNS>
void gradient(const LogitBlock& block, const LogSumExp& lse, const float* du, const LogSumExp& column_lse,
              const float* column_du) {
  for (int64_t r = 0; r < block.rows; ++r) {
    float* row = block.s + r * block.stride;
    const int64_t p = block.positive + r;
    const float maximum = lse.maximum[r], log_sum = lse.log_sum[r], weight = du[r];
    const bool has_positive = block.positive >= 0;
    float own = has_positive ? weight * __builtin_expm1f(row[p] - maximum - log_sum) : 0.0f;
    if (COLUMNS) own += column_du[p] * __builtin_expm1f(row[p] - column_lse.maximum[p] - column_lse.log_sum[p]);
    for_each_vector(block.columns, [&](int64_t j, int64_t lanes) {
      const vfloat s = load(row + j, lanes);
      vfloat ds = exponential(s - maximum - log_sum) * weight;
      if (COLUMNS) {
        const vfloat x = s - load(column_lse.maximum + j, lanes) - load(column_lse.log_sum + j, lanes);
        ds += exponential(x) * load(column_du + j, lanes);
      }
      store_gradient(row, j, ds, lanes, TYPE);
    });
    if (has_positive) store_gradient(row, p, broadcast(own), 1, TYPE);
  }
}

}  // namespace

void info_nce_rows(const LogitBlock& block, const LogSumExp& lse, float* loss, float* correct, const float* du,
                   Element type) {
  (type == Element::float32 ? rows<Element::float32> : rows<Element::bfloat16>)(block, lse, loss, correct, du);
}

void info_nce_gradient(const LogitBlock& block, const LogSumExp& lse, const float* du, const LogSumExp& column_lse,
                       const float* column_du, Element type) {
  const bool columns = column_du != nullptr;
  (type == Element::float32 ? columns ? gradient<Element::float32, true> : gradient<Element::float32, false>
   : columns                ? gradient<Element::bfloat16, true>
                            : gradient<Element::bfloat16, false>)(block, lse, du, column_lse, column_du);
}

void info_nce_columns(const LogitBlock& block, float* maximum, float* sum) {
  constexpr int64_t STRIP = 512;  // columns whose maxima stay in the first-level cache
  float before[STRIP];
  for (int64_t start = 0; start < block.columns; start += STRIP) {
    const int64_t count = block.columns - start < STRIP ? block.columns - start : STRIP;
    float* m = maximum + start;
    float* total = sum + start;
    __builtin_memcpy(before, m, count * sizeof(float));
    for (int64_t r = 0; r < block.rows; ++r) {
      const float* row = block.s + r * block.stride + start;
      for_each_vector(count, [&](int64_t j, int64_t lanes) {
        store(m + j, larger(load(row + j, lanes), load(m + j, lanes)), lanes);
      });
    }
    for_each_vector(count, [&](int64_t j, int64_t lanes) {
      store(total + j, load(total + j, lanes) * exponential(load(before + j, lanes) - load(m + j, lanes)), lanes);
    });
    for (int64_t r = 0; r < block.rows; ++r) {
      const float* row = block.s + r * block.stride + start;
      for_each_vector(count, [&](int64_t j, int64_t lanes) {
        store(total + j, load(total + j, lanes) + exponential(load(row + j, lanes) - load(m + j, lanes)), lanes);
      });
    }
  }
}

void float_to_bfloat16(const float* from, uint16_t* to, int64_t count) {
  for_each_vector(count, [&](int64_t i, int64_t lanes) {
    const vbfloat16 half = to_bfloat16(load(from + i, lanes));
    __builtin_memcpy(to + i, &half, lanes * sizeof(uint16_t));
  });
}

void bfloat16_to_float(const uint16_t* from, float* to, int64_t count) {
  for_each_vector(count, [&](int64_t i, int64_t lanes) {
    vbfloat16 half = {};
    __builtin_memcpy(&half, from + i, lanes * sizeof(uint16_t));
    store(to + i, (vfloat)(__builtin_convertvector(half, vint) << 16), lanes);
  });
}

void add_scaled(float* sum, const float* x, float scale, int64_t count) {
  for_each_vector(count, [&](int64_t i, int64_t lanes) {
    store(sum + i, load(sum + i, lanes) + scale * load(x + i, lanes), lanes);
  });
}

double dot(const float* a, const float* b, int64_t count) {
  constexpr int64_t CHUNK = 1024;  // float sums inside a chunk, a double sum of chunks
  double result = 0.0;
  for (int64_t start = 0; start < count; start += CHUNK) {
    vfloat sum = {};
    for_each_vector(count - start < CHUNK ? count - start : CHUNK, [&](int64_t i, int64_t lanes) {
      sum += load(a + start + i, lanes) * load(b + start + i, lanes);
    });
    result += total<float>(sum);
  }
  return result;
}

}  // namespace avppc::AVPPC_CPU_NAMESPACE
