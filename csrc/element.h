// Loads and stores of fp32, bf16 and fp16 elements as LANES floats, without branches per element.
#pragma once
#include <algorithm>

#include "ops.h"
#include "philox.h"

namespace erdfast::ERDFAST_ARCH {

// Sixteen numbers side by side.
constexpr int WIDTH = 16;
using Vec = float __attribute__((vector_size(4 * WIDTH)));
using UnalignedVec = float __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

inline Vec load_vec(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
inline void store_vec(float* p, Vec value) { *reinterpret_cast<UnalignedVec*>(p) = value; }

inline float half_to_float(uint16_t half) {
  constexpr uint32_t exponent_mask = 0x7c00u << 13;
  const uint32_t shifted = (half & 0x7fffu) << 13, exponent = shifted & exponent_mask;
  const float normal = bits_to_float(shifted + (112u << 23));
  const float infinite = bits_to_float(shifted + (224u << 23));
  const float subnormal = bits_to_float(shifted + (113u << 23)) - 0x1p-14f;
  const float magnitude = exponent == exponent_mask ? infinite : (exponent == 0 ? subnormal : normal);
  return bits_to_float(float_to_bits(magnitude) | ((half & 0x8000u) << 16));
}

inline uint16_t float_to_half(float value) {  // round to nearest even, subnormals kept, overflow to infinity
  const uint32_t bits = float_to_bits(value), sign = bits & 0x80000000u, magnitude = bits ^ sign;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t half = magnitude >= (143u << 23) ? special : (magnitude < (113u << 23) ? subnormal : normal);
  return static_cast<uint16_t>(half | (sign >> 16));
}

inline uint16_t float_to_bfloat(float value) {  // round to nearest even, NaN stays NaN
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

template <class Load>
inline void load_lanes(int count, float* __restrict out, Load load) {
  if (count >= LANES) {
#pragma omp simd simdlen(16)
    for (int i = 0; i < LANES; ++i) out[i] = load(i);
  } else {
    for (int i = 0; i < LANES; ++i) out[i] = 0.0f;
    for (int i = 0; i < count; ++i) out[i] = load(i);
  }
}

inline float element_to_float(float value) { return value; }
struct Bfloat { uint16_t bits; };
struct Half { uint16_t bits; };
inline float element_to_float(Bfloat value) { return bits_to_float(static_cast<uint32_t>(value.bits) << 16); }
inline float element_to_float(Half value) { return half_to_float(value.bits); }
inline void float_to_element(float value, float& out) { out = value; }
inline void float_to_element(float value, Bfloat& out) { out.bits = float_to_bfloat(value); }
inline void float_to_element(float value, Half& out) { out.bits = float_to_half(value); }

// visit(pointer of the array's type), once.
template <class Visit>
inline void with_type(const Array& array, Visit visit) {
  if (array.dtype == Dtype::fp32) return visit(static_cast<float*>(array.data));
  if (array.dtype == Dtype::bf16) return visit(static_cast<Bfloat*>(array.data));
  visit(static_cast<Half*>(array.data));
}

// visit(i, position in memory) for elements [element, element + count) of a channels-last sample.
template <class Visit>
inline void for_channels_last(const Array& array, int64_t b, int64_t element, int count, Visit visit) {
  int64_t c = element / array.pixels, p = element - c * array.pixels;
  for (int i = 0; i < count;) {
    const int run = static_cast<int>(std::min<int64_t>(count - i, array.pixels - p));  // of one channel
    const int64_t first = b * array.stride + p * array.pixel + c;
    for (int k = 0; k < run; ++k) visit(i + k, first + k * array.pixel);
    i += run;
    p = 0;
    ++c;
  }
}

// Elements [element, element + min(count, LANES)) of sample b; missing lanes are 0. A count below 1 reads nothing.
inline void load(const Array& array, int64_t b, int64_t element, int count, float* __restrict out) {
  if (array.pixel) {
    with_type(array, [&](const auto* data) {
      for_channels_last(array, b, element, std::min(count, LANES),
                        [&](int i, int64_t at) { out[i] = element_to_float(data[at]); });
    });
    for (int i = std::max(count, 0); i < LANES; ++i) out[i] = 0.0f;
    return;
  }
  with_type(array, [&](const auto* data) {
    const auto* p = data + (b * array.stride + element);
    load_lanes(count, out, [p](int i) { return element_to_float(p[i]); });
  });
}

inline void store(const Array& array, int64_t b, int64_t element, int count, const float* __restrict in) {
  const int n = std::min(count, LANES);
  if (array.pixel) {
    with_type(array, [&](auto* data) {
      for_channels_last(array, b, element, n, [&](int i, int64_t at) { float_to_element(in[i], data[at]); });
    });
    return;
  }
  with_type(array, [&](auto* data) {
    auto* p = data + (b * array.stride + element);
    if (n == LANES) {
#pragma omp simd simdlen(16)
      for (int i = 0; i < LANES; ++i) float_to_element(in[i], p[i]);
    } else {
      for (int i = 0; i < n; ++i) float_to_element(in[i], p[i]);
    }
  });
}

}  // namespace erdfast::ERDFAST_ARCH
