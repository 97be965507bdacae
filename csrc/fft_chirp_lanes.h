// Transforms of any number n of values, by Bluestein's chirp: with c[k] = exp(-i pi k^2 / n),
//
//   X[k] = c[k] sum_j (x[j] c[j]) conj(c[k - j])
//
// is a convolution, which two transforms of at least 2 n - 1 points do (fft_lanes.h), one there and one back.
#pragma once

#include "fft_lanes.h"

namespace avppc::AVPPC_CPU_NAMESPACE {
namespace {

AVPPC_INLINE Complex<vdouble> times(Complex<vdouble> a, const double* b) {
  const vdouble re = broadcast(b[0]), im = broadcast(b[1]);
  return {a.re * re - a.im * im, a.re * im + a.im * re};
}

AVPPC_INLINE void store_complex(double* buffer, int k, Complex<vdouble> value) {
  store(buffer + int64_t{2} * D * k, value.re);
  store(buffer + int64_t{2} * D * k + D, value.im);
}

// What the first pass there reads: the values of another source times the chirp.
template <typename Source>
struct ChirpSource {
  Source values;
  const double* slots;
  AVPPC_INLINE vdouble operator[](int i) const {
    const int pair = i / 2 * 2;
    const Complex<vdouble> value = times({values[pair], values[pair + 1]}, slots + pair);
    return i == pair ? value.re : value.im;
  }
  AVPPC_INLINE void skip(int count) {
    values.skip(count);
    slots += count;
  }
};

// The last pass there: the conjugate of each product of spectra to where the first pass back wants it.
struct ToProduct {
  double* product;
  const FftChirp& chirp;
  AVPPC_INLINE void operator()(int k, Complex<vdouble> value) const {
    const Complex<vdouble> both = times(value, chirp.spectrum + 2 * k);
    store_complex(product, chirp.place[k], {both.re, -both.im});
  }
  AVPPC_INLINE void operator()(int k, Complex<vdouble> value, int partner, Complex<vdouble> partner_value) const {
    (*this)(k, value);
    (*this)(partner, partner_value);
  }
};

struct ProductSource {
  const double* product;
  AVPPC_INLINE vdouble operator[](int i) const { return load<vdouble>(product + D * i); }
  AVPPC_INLINE void skip(int count) { product += D * count; }
};

// The last pass back. A transform of conjugates gives the conjugate of the inverse transform.
struct ToResult {
  double* result;
  const double* chirp;
  int points;
  AVPPC_INLINE void operator()(int k, Complex<vdouble> value) const {
    if (k < points) store_complex(result, k, times({value.re, -value.im}, chirp + 2 * k));
  }
  AVPPC_INLINE void operator()(int k, Complex<vdouble> value, int partner, Complex<vdouble> partner_value) const {
    (*this)(k, value);
    (*this)(partner, partner_value);
  }
};

// The transform of n values, to result [2 n, D]; buffer and result have room for the longer transform.
template <typename Source, typename Fetcher>
void fft_by_chirp(const FftTables& fft, const FftChirp& chirp, int n, const Source& source, const int* live,
                  double* buffer, double* result, Fetcher& fetcher) {
  fft_transform(fft, source, live, buffer, fetcher, ToProduct{result, chirp});
  fft_transform(fft, ProductSource{result}, chirp.live, buffer, fetcher, ToResult{result, chirp.values, n});
}

}  // namespace
}  // namespace avppc::AVPPC_CPU_NAMESPACE
