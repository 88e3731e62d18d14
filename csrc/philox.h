// Standard normals from a 128-bit counter, 64 at a time: the words of erdfast/philox.py, with polynomial log and sincos.
//
// The arithmetic is written as loops over LANES independent lanes without branches, so that one source vectorises for every
// instruction set; the integer rounds have intrinsics for AVX2 and AVX-512. libm's log, sin and cos would make the generator
// five times slower: they do not vectorise here.
// Accuracy against the float64 definition: 5e-7 absolute.
#pragma once
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>

#ifndef ERDFAST_ARCH
#error "ERDFAST_ARCH names the namespace of this translation unit"
#endif

namespace erdfast::ERDFAST_ARCH {

constexpr int LANES = 16;  // one AVX-512 register; two AVX2 registers, which also hides latency there

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// Natural logarithm on (0, 1], relative error 1e-7: exponent split at sqrt(1/2), then Cephes' degree-9 polynomial.
inline float log_unit(float x) {
  uint32_t bits = float_to_bits(x);
  const int32_t exponent = static_cast<int32_t>(bits - 0x3f3504f3u) >> 23;
  bits -= static_cast<uint32_t>(exponent) << 23;
  const float f = bits_to_float(bits) - 1.0f, f2 = f * f, e = static_cast<float>(exponent);
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const float low = f * f2 * p + e * -2.12194440e-4f - 0.5f * f2;  // ln 2 in two parts keeps the small end exact
  return f + low + e * 0.693359375f;
}

// sin and cos of 2*pi*phase/2^32. The quadrant comes from the top bits, the rest is an exact 30-bit integer: no
// argument reduction, no loss of accuracy for large angles.
inline void sincos_phase(uint32_t phase, float& sine, float& cosine) {
  const uint32_t quadrant = (phase + 0x20000000u) >> 30;
  const int32_t rest = static_cast<int32_t>(phase - (quadrant << 30));
  const float t = static_cast<float>(rest) * (1.5707963267948966f / 1073741824.0f), t2 = t * t;
  const float s = t + t * t2 * (-1.6666654611e-1f + t2 * (8.3321608736e-3f + t2 * -1.9515295891e-4f));
  const float c = 1.0f - 0.5f * t2 +
                  t2 * t2 * (4.166664568298827e-2f + t2 * (-1.388731625493765e-3f + t2 * 2.443315711809948e-5f));
  // Odd quadrants swap the two; the signs are those of the quadrant. Bit operations, because a branch stops vectorising.
  const uint32_t swap = 0u - (quadrant & 1u), difference = (float_to_bits(s) ^ float_to_bits(c)) & swap;
  sine = bits_to_float(float_to_bits(s) ^ difference ^ ((quadrant & 2u) << 30));
  cosine = bits_to_float(float_to_bits(c) ^ difference ^ (((quadrant + 1u) & 2u) << 30));
}

// fl32(word >> 1) * 2^-31 + 2^-32 in (0, 1]: exactly erdfast.philox.unit_interval.
inline float unit_interval(uint32_t word) {
  return static_cast<float>(static_cast<int32_t>(word >> 1)) * 0x1p-31f + 0x1p-32f;
}

constexpr uint32_t M0 = 0xD2511F53u, M1 = 0xCD9E8D57u;
constexpr uint32_t W0 = 0x9E3779B9u, W1 = 0xBB67AE85u;  // what the key grows by, from round to round

// Words of LANES consecutive counters: words[k][i] is word k of counter (q + i, id low, id high, stream).
//
// One 32-bit number per 64-bit slot, upper half ignored: the widening product reads the lower halves alone, so a round
// needs no shuffles (1.5 times the speed of what GCC 12 makes of the portable loop below, on AVX-512 and AVX2).
#if defined(__AVX512F__)
using Slots = __m512i;
inline Slots slots(uint64_t value) { return _mm512_set1_epi64(static_cast<long long>(value)); }
inline Slots slots_from(uint32_t q) { return _mm512_add_epi64(slots(q), _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0)); }
inline Slots product(Slots a, Slots b) { return _mm512_mul_epu32(a, b); }
inline Slots high_half(Slots a) { return _mm512_srli_epi64(a, 32); }
inline Slots xor3(Slots a, Slots b, Slots c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
inline void write_slots(uint32_t* out, Slots a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi64_epi32(a));
}
#define ERDFAST_SLOTS 8
#elif defined(__AVX2__)
using Slots = __m256i;
inline Slots slots(uint64_t value) { return _mm256_set1_epi64x(static_cast<long long>(value)); }
inline Slots slots_from(uint32_t q) { return _mm256_add_epi64(slots(q), _mm256_set_epi64x(3, 2, 1, 0)); }
inline Slots product(Slots a, Slots b) { return _mm256_mul_epu32(a, b); }
inline Slots high_half(Slots a) { return _mm256_srli_epi64(a, 32); }
inline Slots xor3(Slots a, Slots b, Slots c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
inline void write_slots(uint32_t* out, Slots a) {
  const Slots packed = _mm256_permutevar8x32_epi32(a, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(packed));
}
#define ERDFAST_SLOTS 4
#endif

#ifdef ERDFAST_SLOTS
struct Counters {
  Slots c0, c1, c2, c3;

  void round(Slots m0, Slots m1, Slots k0, Slots k1) {
    const Slots p0 = product(m0, c0), p1 = product(m1, c2);
    c0 = xor3(high_half(p1), c1, k0);
    c2 = xor3(high_half(p0), c3, k1);
    c1 = p1;
    c3 = p0;
  }

  void write(uint32_t (*words)[LANES], int first) const {
    write_slots(words[0] + first, c0);
    write_slots(words[1] + first, c1);
    write_slots(words[2] + first, c2);
    write_slots(words[3] + first, c3);
  }
};

__attribute__((noinline)) inline void philox_words(uint64_t seed, uint64_t id, uint32_t stream, uint32_t q,
                                                   uint32_t (*words)[LANES]) {
  const Slots m0 = slots(M0), m1 = slots(M1), id_low = slots(id & 0xffffffffu), id_high = slots(id >> 32);
  for (int first = 0; first < LANES; first += 2 * ERDFAST_SLOTS) {  // two chains of rounds hide the multiplier's latency
    const uint32_t next = first + ERDFAST_SLOTS;
    Counters a{slots_from(q + first), id_low, id_high, slots(stream)};
    Counters b{slots_from(q + next), id_low, id_high, slots(stream)};
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int i = 0; i < 10; ++i, k0 += W0, k1 += W1) {
      const Slots key0 = slots(k0), key1 = slots(k1);
      a.round(m0, m1, key0, key1);
      b.round(m0, m1, key0, key1);
    }
    a.write(words, first);
    b.write(words, static_cast<int>(next));
  }
}
#undef ERDFAST_SLOTS
#else
inline void philox_words(uint64_t seed, uint64_t id, uint32_t stream, uint32_t q, uint32_t (*words)[LANES]) {
  for (int i = 0; i < LANES; ++i) {
    uint32_t c0 = q + static_cast<uint32_t>(i), c1 = static_cast<uint32_t>(id), c2 = static_cast<uint32_t>(id >> 32);
    uint32_t c3 = stream, k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += W0, k1 += W1) {
      const uint64_t p0 = uint64_t{M0} * c0, p1 = uint64_t{M1} * c2;
      c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
      c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
      c1 = static_cast<uint32_t>(p1);
      c3 = static_cast<uint32_t>(p0);
    }
    words[0][i] = c0;
    words[1][i] = c1;
    words[2][i] = c2;
    words[3][i] = c3;
  }
}
#endif

// Never inlined: inside a larger function GCC 12 gives up on vectorising this loop, and the call is for 32 normals.
__attribute__((noinline)) inline void box_muller(const uint32_t* __restrict radius_words,
                                                 const uint32_t* __restrict phase_words, float* __restrict first,
                                                 float* __restrict second) {
#pragma omp simd simdlen(16)
  for (int i = 0; i < LANES; ++i) {
    const float radius = std::sqrt(-2.0f * log_unit(unit_interval(radius_words[i])));
    float sine, cosine;
    sincos_phase(phase_words[i], sine, cosine);
    first[i] = radius * cosine;
    second[i] = radius * sine;
  }
}

struct NoiseStream {
  uint64_t seed, sample_id;
  uint32_t stream;

  // normals[j][i] belongs to element q + i + j*Q of the sample.
  void fill(uint32_t q, float (*normals)[LANES]) const {
    alignas(64) uint32_t words[4][LANES];
    philox_words(seed, sample_id, stream, q, words);
    box_muller(words[0], words[1], normals[0], normals[1]);
    box_muller(words[2], words[3], normals[2], normals[3]);
  }
};

}  // namespace erdfast::ERDFAST_ARCH
