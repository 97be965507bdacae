// The arithmetic of a mixed-radix Fourier transform: butterflies of 2, 3, 4, 5 and 8 values of type V, which is a
// number or a vector of numbers. Shared by the CPU kernels (fft_lanes.h) and the CUDA kernels (log_mel_block.h).
//
// A rotation w = exp(i a) is stored as (cos a, tan a): a + w b and a - w b then take six fused multiply-adds. At a = 90
// degrees the tangent is 1.6e16 and the cosine its inverse, and the result is still right to the last bits.
#pragma once

// Always inlined: a value that passes through memory costs more than the arithmetic on it.
#if defined(__CUDACC__)
#define AVPPC_INLINE __host__ __device__ __forceinline__
#else
#define AVPPC_INLINE inline __attribute__((always_inline))
#endif
#if defined(__CUDA_ARCH__)
#define AVPPC_UNROLL _Pragma("unroll")
#elif defined(__CUDACC__)  // nvcc's pass for the host has no use for it
#define AVPPC_UNROLL
#else
#define AVPPC_UNROLL _Pragma("GCC unroll 16")
#endif

namespace avppc {
namespace {

// The type of one number of a V.
template <typename V>
struct Scalar {
  using type = double;
};
template <>
struct Scalar<float> {
  using type = float;
};

template <typename V>
struct Complex {
  V re, im;
};

// Rotations as a table has them; a butterfly wants COUNT.
template <int COUNT, typename V>
struct Rotations {
  V cosine[COUNT], tangent[COUNT];
};

template <typename V>
AVPPC_INLINE Complex<V> operator+(Complex<V> a, Complex<V> b) {
  return {a.re + b.re, a.im + b.im};
}

template <typename V>
AVPPC_INLINE Complex<V> operator-(Complex<V> a, Complex<V> b) {
  return {a.re - b.re, a.im - b.im};
}

template <typename V>
AVPPC_INLINE Complex<V> operator*(Complex<V> a, typename Scalar<V>::type b) {
  return {a.re * b, a.im * b};
}

template <typename V>
AVPPC_INLINE Complex<V> times_minus_i(Complex<V> a) {
  return {a.im, -a.re};
}

// (a, b) -> (a + b, a - b)
template <typename V>
AVPPC_INLINE void combine(Complex<V>& a, Complex<V>& b) {
  const Complex<V> difference = a - b;
  a = a + b;
  b = difference;
}

// (a, b) -> (a + w b, a - w b), w = cosine (1 + i tangent)
template <typename V>
AVPPC_INLINE void combine(Complex<V>& a, Complex<V>& b, V cosine, V tangent) {
  const Complex<V> turned = {b.re - b.im * tangent, b.im + b.re * tangent};
  b = {a.re - turned.re * cosine, a.im - turned.im * cosine};
  a = {a.re + turned.re * cosine, a.im + turned.im * cosine};
}

// (a, b) -> (a - i b, a + i b)
template <typename V>
AVPPC_INLINE void combine_minus_i(Complex<V>& a, Complex<V>& b) {
  const Complex<V> sum = {a.re - b.im, a.im + b.re};
  a = {a.re + b.im, a.im - b.re};
  b = sum;
}

// (a, b) -> (a - i w b, a + i w b)
template <typename V>
AVPPC_INLINE void combine_minus_i(Complex<V>& a, Complex<V>& b, V cosine, V tangent) {
  const Complex<V> turned = {b.re - b.im * tangent, b.im + b.re * tangent};
  b = {a.re - turned.im * cosine, a.im + turned.re * cosine};
  a = {a.re + turned.im * cosine, a.im - turned.re * cosine};
}

// Butterfly<R>: transforms R values in place; twiddled: after multiplying value k by w^k, which ROTATIONS describe.
template <int R, typename V>
struct Butterfly;

template <typename V>
struct Butterfly<2, V> {
  static constexpr int ROTATIONS = 1;  // w
  static AVPPC_INLINE void plain(Complex<V> (&x)[2]) { combine(x[0], x[1]); }
  static AVPPC_INLINE void twiddled(Complex<V> (&x)[2], const Rotations<ROTATIONS, V>& w) {
    combine(x[0], x[1], w.cosine[0], w.tangent[0]);
  }
};

template <typename V>
struct Butterfly<4, V> {
  static constexpr int ROTATIONS = 2;  // w^2, w
  static AVPPC_INLINE void plain(Complex<V> (&x)[4]) {
    combine(x[0], x[2]);
    combine(x[1], x[3]);
    combine(x[0], x[1]);
    combine_minus_i(x[2], x[3]);
    sort(x);
  }
  static AVPPC_INLINE void twiddled(Complex<V> (&x)[4], const Rotations<ROTATIONS, V>& w) {
    combine(x[0], x[2], w.cosine[0], w.tangent[0]);
    combine(x[1], x[3], w.cosine[0], w.tangent[0]);
    combine(x[0], x[1], w.cosine[1], w.tangent[1]);
    combine_minus_i(x[2], x[3], w.cosine[1], w.tangent[1]);
    sort(x);
  }
  static AVPPC_INLINE void sort(Complex<V> (&x)[4]) {  // 0 2 1 3 -> 0 1 2 3
    const Complex<V> second = x[2];
    x[2] = x[1];
    x[1] = second;
  }
};

template <typename V>
struct Butterfly<8, V> {
  static constexpr int ROTATIONS = 4;  // w^4, w^2, w, w exp(-i pi / 4)
  static AVPPC_INLINE void plain(Complex<V> (&x)[8]) {
    using Number = typename Scalar<V>::type;
    const V half_root = V{} + Number(0.707106781186547524), minus_one = V{} - Number(1);  // tangent of -45 degrees
    AVPPC_UNROLL
    for (int k = 0; k < 4; ++k) combine(x[k], x[k + 4]);
    combine(x[0], x[2]);
    combine(x[1], x[3]);
    combine_minus_i(x[4], x[6]);
    combine_minus_i(x[5], x[7]);
    combine(x[0], x[1]);
    combine_minus_i(x[2], x[3]);
    combine(x[4], x[5], half_root, minus_one);
    combine_minus_i(x[6], x[7], half_root, minus_one);
    sort(x);
  }
  static AVPPC_INLINE void twiddled(Complex<V> (&x)[8], const Rotations<ROTATIONS, V>& w) {
    AVPPC_UNROLL
    for (int k = 0; k < 4; ++k) combine(x[k], x[k + 4], w.cosine[0], w.tangent[0]);
    combine(x[0], x[2], w.cosine[1], w.tangent[1]);
    combine(x[1], x[3], w.cosine[1], w.tangent[1]);
    combine_minus_i(x[4], x[6], w.cosine[1], w.tangent[1]);
    combine_minus_i(x[5], x[7], w.cosine[1], w.tangent[1]);
    combine(x[0], x[1], w.cosine[2], w.tangent[2]);
    combine_minus_i(x[2], x[3], w.cosine[2], w.tangent[2]);
    combine(x[4], x[5], w.cosine[3], w.tangent[3]);
    combine_minus_i(x[6], x[7], w.cosine[3], w.tangent[3]);
    sort(x);
  }
  static AVPPC_INLINE void sort(Complex<V> (&x)[8]) {  // 0 4 2 6 1 5 3 7 -> 0 ... 7
    const Complex<V> first = x[1], third = x[3];
    x[1] = x[4];
    x[4] = first;
    x[3] = x[6];
    x[6] = third;
  }
};

template <int R, typename V>
AVPPC_INLINE void multiply_powers(Complex<V> (&x)[R], const Rotations<R - 1, V>& w) {
  AVPPC_UNROLL
  for (int k = 1; k < R; ++k) {
    const V cosine = w.cosine[k - 1], sine = w.tangent[k - 1];
    x[k] = {x[k].re * cosine - x[k].im * sine, x[k].re * sine + x[k].im * cosine};
  }
}

template <typename V>
struct Butterfly<3, V> {
  static constexpr int ROTATIONS = 2;  // w, w^2, each as cosine and sine
  static AVPPC_INLINE void plain(Complex<V> (&x)[3]) {
    using Number = typename Scalar<V>::type;
    const Complex<V> sum = x[1] + x[2];
    const Complex<V> middle = x[0] - sum * Number(0.5);
    const Complex<V> side = times_minus_i((x[1] - x[2]) * Number(0.866025403784438647));  // sin 60
    x[0] = x[0] + sum;
    x[1] = middle + side;
    x[2] = middle - side;
  }
  static AVPPC_INLINE void twiddled(Complex<V> (&x)[3], const Rotations<ROTATIONS, V>& w) {
    multiply_powers(x, w);
    plain(x);
  }
};

template <typename V>
struct Butterfly<5, V> {
  static constexpr int ROTATIONS = 4;  // w ... w^4, each as cosine and sine
  static AVPPC_INLINE void plain(Complex<V> (&x)[5]) {
    using Number = typename Scalar<V>::type;
    constexpr Number cos72 = Number(0.309016994374947424), cos144 = Number(-0.809016994374947424);
    constexpr Number sin72 = Number(0.951056516295153572), sin144 = Number(0.587785252292473129);
    const Complex<V> sum14 = x[1] + x[4], sum23 = x[2] + x[3];
    const Complex<V> difference14 = x[1] - x[4], difference23 = x[2] - x[3];
    const Complex<V> middle14 = x[0] + sum14 * cos72 + sum23 * cos144;
    const Complex<V> middle23 = x[0] + sum14 * cos144 + sum23 * cos72;
    const Complex<V> side14 = times_minus_i(difference14 * sin72 + difference23 * sin144);
    const Complex<V> side23 = times_minus_i(difference14 * sin144 - difference23 * sin72);
    x[0] = x[0] + sum14 + sum23;
    x[1] = middle14 + side14;
    x[4] = middle14 - side14;
    x[2] = middle23 + side23;
    x[3] = middle23 - side23;
  }
  static AVPPC_INLINE void twiddled(Complex<V> (&x)[5], const Rotations<ROTATIONS, V>& w) {
    multiply_powers(x, w);
    plain(x);
  }
};

}  // namespace
}  // namespace avppc
