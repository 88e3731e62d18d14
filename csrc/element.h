// Loads and stores of fp32, bf16 and fp16 elements as LANES floats, without branches per element.
#pragma once
#include <algorithm>

#include "ops.h"
#include "philox.h"

namespace erdfast::ERDFAST_ARCH {

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

// Elements [offset, offset + min(count, LANES)) of an array; missing lanes are 0. A count below 1 reads nothing.
inline void load(const Array& array, int64_t offset, int count, float* __restrict out) {
  if (array.dtype == Dtype::fp32) {
    const float* p = static_cast<const float*>(array.data) + offset;
    load_lanes(count, out, [p](int i) { return p[i]; });
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(array.data) + offset;
    if (array.dtype == Dtype::bf16)
      load_lanes(count, out, [p](int i) { return bits_to_float(static_cast<uint32_t>(p[i]) << 16); });
    else
      load_lanes(count, out, [p](int i) { return half_to_float(p[i]); });
  }
}

// The same elements where they are, if they are whole float32 lanes; else as `load` puts them into `buffer`.
inline const float* view(const Array& array, int64_t offset, int count, float* __restrict buffer) {
  if (array.dtype == Dtype::fp32 && count >= LANES) return static_cast<const float*>(array.data) + offset;
  load(array, offset, count, buffer);
  return buffer;
}

inline void store(const Array& array, int64_t offset, int count, const float* __restrict in) {
  const int n = std::min(count, LANES);
  if (array.dtype == Dtype::fp32) {
    float* p = static_cast<float*>(array.data) + offset;
    if (n == LANES) {
#pragma omp simd simdlen(16)
      for (int i = 0; i < LANES; ++i) p[i] = in[i];
    } else {
      for (int i = 0; i < n; ++i) p[i] = in[i];
    }
    return;
  }
  uint16_t converted[LANES];
  if (array.dtype == Dtype::bf16) {
#pragma omp simd simdlen(16)
    for (int i = 0; i < LANES; ++i) converted[i] = float_to_bfloat(in[i]);
  } else {
#pragma omp simd simdlen(16)
    for (int i = 0; i < LANES; ++i) converted[i] = float_to_half(in[i]);
  }
  if (n > 0) std::memcpy(static_cast<uint16_t*>(array.data) + offset, converted, sizeof(uint16_t) * n);
}

// Where LANES results may be written: straight into the array if they fit there, else into `buffer`, for `finish`.
inline float* target(const Array& array, int64_t offset, int count, float* buffer) {
  const bool direct = array.data && array.dtype == Dtype::fp32 && count >= LANES;
  return direct ? static_cast<float*>(array.data) + offset : buffer;
}

inline void finish(const Array& array, int64_t offset, int count, const float* written, const float* buffer) {
  if (array.data && written == buffer) store(array, offset, count, buffer);
}

}  // namespace erdfast::ERDFAST_ARCH
