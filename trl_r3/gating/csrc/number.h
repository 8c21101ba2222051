// Numbers as the gating kernels see them, on the host and on the device: storage types, exp, and keys for comparing.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define GATING_FN __host__ __device__ __forceinline__
#define GATING_SIMD(operation, variable)
#else
#define GATING_FN inline __attribute__((always_inline))
// On a CPU the next loop becomes vector code, for which a sum has to be free in its order.
#define GATING_PRAGMA(text) _Pragma(#text)
#define GATING_SIMD(operation, variable) GATING_PRAGMA(omp simd reduction(operation : variable))
#endif

namespace gating {

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

enum class Real : int { bf16, fp16, fp32, fp64 };
enum class Id : int { u8, i16, i32, i64 };

template <class To, class From>
GATING_FN To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "one size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// Arithmetic is in float, for double in double.
template <class Logit>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};

GATING_FN float widen(float x) { return x; }
GATING_FN double widen(double x) { return x; }
GATING_FN float widen(Bf16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }
GATING_FN float widen(Fp16 x) {
#ifdef __CUDA_ARCH__
  return __half2float(bits_as<__half>(x.bits));
#else
  // Shifted into place, the exponent is short by the difference of the biases, which one multiplication repairs,
  // subnormals included. Infinity and NaN keep the largest exponent instead.
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  const uint32_t scaled = bits_as<uint32_t>(bits_as<float>(magnitude) * 0x1p112f);
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  return bits_as<float>(scaled | special | (uint32_t(x.bits & 0x8000) << 16));
#endif
}

template <class Storage>
struct Narrow;
template <>
struct Narrow<float> {
  static GATING_FN float from(float x) { return x; }
};
template <>
struct Narrow<double> {
  static GATING_FN double from(double x) { return x; }
};
template <>
struct Narrow<Bf16> {
  static GATING_FN Bf16 from(float x) {
    const uint32_t bits = bits_as<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
    return Bf16{uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
  }
};
template <>
struct Narrow<Fp16> {
  static GATING_FN Fp16 from(float x) {
#ifdef __CUDA_ARCH__
    return Fp16{bits_as<uint16_t>(__float2half_rn(x))};
#else
    const uint32_t sign = (bits_as<uint32_t>(x) >> 16) & 0x8000u;
    const uint32_t bits = bits_as<uint32_t>(x) & 0x7fffffffu;
    // The sum of a subnormal and one half has the rounded result in its lowest bits.
    const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(bits) + 0.5f) - 0x3f000000u;
    const uint32_t normal = (bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13;  // to nearest, ties to even
    const uint32_t special = bits > 0x7f800000u ? 0x7e00u : 0x7c00u;
    return Fp16{uint16_t(sign | (bits < 0x38800000u ? subnormal : (bits < 0x47800000u ? normal : special)))};
#endif
  }
};

template <class T>
GATING_FN T load_real(const void* base, int64_t index, Real type) {
  switch (type) {
    case Real::bf16: return T(widen(static_cast<const Bf16*>(base)[index]));
    case Real::fp16: return T(widen(static_cast<const Fp16*>(base)[index]));
    case Real::fp32: return T(static_cast<const float*>(base)[index]);
    default: return T(static_cast<const double*>(base)[index]);
  }
}

// Calls `use` with a pointer of the type that `base` has. The choice is made once, outside of the loops in `use`.
template <class Use>
GATING_FN void with_reals(void* base, Real type, Use use) {
  switch (type) {
    case Real::bf16: use(static_cast<Bf16*>(base)); break;
    case Real::fp16: use(static_cast<Fp16*>(base)); break;
    case Real::fp32: use(static_cast<float*>(base)); break;
    case Real::fp64: use(static_cast<double*>(base)); break;
  }
}

// An id in arithmetic that knows its sign and its every bit.
template <class Storage>
using WideId = std::conditional_t<sizeof(Storage) == 8, int64_t, int32_t>;

template <class Use>
GATING_FN void with_ids(const void* base, Id type, Use use) {
  switch (type) {
    case Id::u8: use(static_cast<const uint8_t*>(base)); break;
    case Id::i16: use(static_cast<const int16_t*>(base)); break;
    case Id::i32: use(static_cast<const int32_t*>(base)); break;
    case Id::i64: use(static_cast<const int64_t*>(base)); break;
  }
}

GATING_FN double exponential(double x) { return exp(x); }
GATING_FN float exponential(float x) {
#ifdef __CUDA_ARCH__
  return expf(x);
#else
  // x = n ln 2 + r, and a polynomial for exp(r): unlike a call into libm, loops over it become vector code. The error is
  // below 2 units in the last place. Comparisons keep NaN; 2^n comes in two factors, so that subnormals are reached.
  x = x > 89.0f ? 89.0f : x;
  x = x < -110.0f ? -110.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.0f;
  const int32_t power = bits_as<int32_t>(shifted) - 0x4b400000;
  const int32_t half = power >> 1;
  return p * bits_as<float>((half + 127) << 23) * bits_as<float>((power - half + 127) << 23);
#endif
}

// A key compares like its number: -0 equals 0, and every NaN is one largest value. No number has the key `lowest`.
template <class K>
constexpr K lowest = std::numeric_limits<K>::min();
template <class K>
constexpr K highest = std::numeric_limits<K>::max();

template <class T>
struct Key;
template <>
struct Key<float> {
  using type = int32_t;
  static GATING_FN int32_t of(float x) {
    const int32_t bits = bits_as<int32_t>(x + 0.0f);
    return x != x ? highest<int32_t> : bits ^ ((bits >> 31) & 0x7fffffff);
  }
  static GATING_FN float number(int32_t key) { return bits_as<float>(key ^ ((key >> 31) & 0x7fffffff)); }
};
template <>
struct Key<double> {
  using type = int64_t;
  static GATING_FN int64_t of(double x) {
    const int64_t bits = bits_as<int64_t>(x + 0.0);
    return x != x ? highest<int64_t> : bits ^ ((bits >> 63) & 0x7fffffffffffffffLL);
  }
  static GATING_FN double number(int64_t key) {
    return bits_as<double>(key ^ ((key >> 63) & 0x7fffffffffffffffLL));
  }
};

}  // namespace gating
