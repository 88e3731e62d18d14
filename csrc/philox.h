// Standard normals from a 128-bit counter, 256 at a time: the words of erdfast/philox.py, with polynomial log and sincos.
//
// The arithmetic is written as loops over LANES independent lanes without branches, so that one source vectorises for every
// instruction set; the integer rounds have intrinsics for AVX2 and AVX-512. libm's log, sin and cos would make the generator
// five times slower: they do not vectorise here.
// Accuracy against the float64 definition: 7e-7 absolute.
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

constexpr int LANES = 64;  // lanes of a block: enough independent work to hide the latency of multipliers and square roots
constexpr int GROUP = 32;  // lanes that are computed together; a smaller sample pays for one group

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

// -2 ln u for u in [2^-32, 1]. u = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)): 0x3f3504f3 is sqrt(1/2), where the
// exponent changes. Minimax fits, the same as in kernels/philox.py.
inline float minus_two_log(float u) {
  const int32_t shifted = static_cast<int32_t>(float_to_bits(u) - 0x3f3504f3u);
  const float exponent = static_cast<float>(shifted >> 23);
  const float f = bits_to_float((static_cast<uint32_t>(shifted) & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
  float p = -0.17400871217250824f * f + 0.2853497266769409f;
  p = p * f - 0.29829534888267517f;
  p = p * f + 0.3315517008304596f;
  p = p * f - 0.3992612659931183f;
  p = p * f + 0.5000267624855042f;
  p = p * f - 0.6666781902313232f;
  p = p * f + 1.0f;
  return exponent * -1.3862943611198906f + ((f * f) * p - 2.0f * f);
}

// sin and cos of 2*pi*phase/2^32. The quadrant comes from the top bits after a shift by an eighth of a turn, the rest is
// an exact 30-bit integer: no argument reduction, no loss of accuracy for large angles.
inline void sincos_phase(uint32_t phase, float& sine, float& cosine) {
  const uint32_t turned = phase + 0x20000000u;
  const int32_t rest = static_cast<int32_t>(turned & 0x3fffffffu) - 0x20000000;
  const float x = static_cast<float>(rest) * 9.313225746154785e-10f, z = x * x;
  const float s = (((-0.004592289216816425f * z + 0.07967590540647507f) * z - 0.6459629535675049f) * z + 1.570796251296997f) * x;
  const float c = ((-0.020426250994205475f * z + 0.2536063492298126f) * z - 1.2336980104446411f) * z + 1.0f;
  // Odd quadrants swap the two; the signs are those of the quadrant. Bit operations, because a branch stops vectorising.
  const uint32_t swap = 0u - ((turned >> 30) & 1u), difference = (float_to_bits(s) ^ float_to_bits(c)) & swap;
  sine = bits_to_float(float_to_bits(s) ^ difference ^ (turned & 0x80000000u));
  cosine = bits_to_float(float_to_bits(c) ^ difference ^ ((turned + 0x40000000u) & 0x80000000u));
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
// needs no shuffles (1.5 times the speed of what GCC 12 makes of the portable loop below).
#if defined(__AVX512F__)
using Slots = __m512i;
inline Slots slots(uint64_t value) { return _mm512_set1_epi64(static_cast<long long>(value)); }
inline Slots slots_from(uint32_t q) { return _mm512_add_epi64(slots(q), _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0)); }
inline Slots grown(Slots a, Slots b) { return _mm512_add_epi32(a, b); }
inline Slots product(Slots a, Slots b) { return _mm512_mul_epu32(a, b); }
inline Slots high_half(Slots a) { return _mm512_shuffle_epi32(a, _MM_PERM_DDBB); }
inline Slots xor3(Slots a, Slots b, Slots c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
inline void write_pair(uint32_t* out, Slots a, Slots b) {
  const Slots low_halves = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  _mm512_storeu_si512(out, _mm512_permutex2var_epi32(a, low_halves, b));
}
#define ERDFAST_SLOTS 8
#elif defined(__AVX2__)
using Slots = __m256i;
inline Slots slots(uint64_t value) { return _mm256_set1_epi64x(static_cast<long long>(value)); }
inline Slots slots_from(uint32_t q) { return _mm256_add_epi64(slots(q), _mm256_set_epi64x(3, 2, 1, 0)); }
inline Slots grown(Slots a, Slots b) { return _mm256_add_epi32(a, b); }
inline Slots product(Slots a, Slots b) { return _mm256_mul_epu32(a, b); }
inline Slots high_half(Slots a) { return _mm256_srli_epi64(a, 32); }
inline Slots xor3(Slots a, Slots b, Slots c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
inline void write_pair(uint32_t* out, Slots a, Slots b) {
  const __m256 halves = _mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), 0x88);  // a01 b01 a23 b23
  _mm256_storeu_si256(reinterpret_cast<Slots*>(out), _mm256_permute4x64_epi64(_mm256_castps_si256(halves), 0xd8));
}
#define ERDFAST_SLOTS 4
#endif

#ifdef ERDFAST_SLOTS
// Four independent chains of rounds hide the multiplier's latency: 1.2 times the speed of two.
constexpr int CHAINS = 4;
static_assert(GROUP % (CHAINS * ERDFAST_SLOTS) == 0);

__attribute__((noinline)) inline void philox_words(uint64_t seed, uint64_t id, uint32_t stream, uint32_t q, int lanes,
                                                   uint32_t (*words)[LANES]) {
  // In the first two rounds all but what comes of q is the same for all lanes: a twelfth of the work.
  const uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  const uint64_t p1 = uint64_t{M1} * (id >> 32);
  const uint64_t p0 = uint64_t{M0} * (static_cast<uint32_t>(p1 >> 32) ^ static_cast<uint32_t>(id) ^ k0);
  const Slots m0 = slots(M0), m1 = slots(M1), first_c2 = slots(stream ^ k1);
  const Slots w0 = slots(W0), w1 = slots(W1), third_key0 = slots(k0 + 2 * W0), third_key1 = slots(k1 + 2 * W1);
  const Slots second_c0 = slots(static_cast<uint32_t>(p1) ^ (k0 + W0)), zero = slots(0);
  const Slots second_c2 = slots(static_cast<uint32_t>(p0 >> 32) ^ (k1 + W1)), second_c3 = slots(static_cast<uint32_t>(p0));
  for (int first = 0; first < lanes; first += CHAINS * ERDFAST_SLOTS) {
    Slots c0[CHAINS], c1[CHAINS], c2[CHAINS], c3[CHAINS];
    for (int k = 0; k < CHAINS; ++k) {
      const Slots from_q = product(m0, slots_from(q + static_cast<uint32_t>(first + k * ERDFAST_SLOTS)));
      c1[k] = product(m1, xor3(high_half(from_q), first_c2, zero));
      c0[k] = xor3(high_half(c1[k]), second_c0, zero);
      c2[k] = xor3(from_q, second_c2, zero);
      c3[k] = second_c3;
    }
    Slots key0 = third_key0, key1 = third_key1;
    for (int round = 2; round < 10; ++round, key0 = grown(key0, w0), key1 = grown(key1, w1)) {
      for (int k = 0; k < CHAINS; ++k) {
        const Slots p0 = product(m0, c0[k]), p1 = product(m1, c2[k]);
        c0[k] = xor3(high_half(p1), c1[k], key0);
        c2[k] = xor3(high_half(p0), c3[k], key1);
        c1[k] = p1;
        c3[k] = p0;
      }
    }
    for (int k = 0; k < CHAINS; k += 2) {
      const int at = first + k * ERDFAST_SLOTS;
      write_pair(words[0] + at, c0[k], c0[k + 1]);
      write_pair(words[1] + at, c1[k], c1[k + 1]);
      write_pair(words[2] + at, c2[k], c2[k + 1]);
      write_pair(words[3] + at, c3[k], c3[k + 1]);
    }
  }
}
#undef ERDFAST_SLOTS
#else
inline void philox_words(uint64_t seed, uint64_t id, uint32_t stream, uint32_t q, int lanes, uint32_t (*words)[LANES]) {
  for (int i = 0; i < lanes; ++i) {
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

// Never inlined: inside a larger function GCC 12 gives up on vectorising this loop, and the call is for many normals.
__attribute__((noinline)) inline void box_muller(const uint32_t* __restrict radius_words,
                                                 const uint32_t* __restrict phase_words, int lanes,
                                                 float* __restrict first, float* __restrict second) {
#pragma omp simd simdlen(16)
  for (int i = 0; i < lanes; ++i) {
    const float radius = std::sqrt(minus_two_log(unit_interval(radius_words[i])));
    float sine, cosine;
    sincos_phase(phase_words[i], sine, cosine);
    first[i] = radius * cosine;
    second[i] = radius * sine;
  }
}

struct NoiseStream {
  uint64_t seed, sample_id;
  uint32_t stream;

  // normals[j][i] belongs to element q + i + j*Q of the sample, for i below `lanes` (rounded up to whole groups).
  void fill(uint32_t q, int lanes, float (*normals)[LANES]) const {
    alignas(64) uint32_t words[4][LANES];
    lanes = (lanes + GROUP - 1) / GROUP * GROUP;
    philox_words(seed, sample_id, stream, q, lanes, words);
    box_muller(words[0], words[1], lanes, normals[0], normals[1]);
    box_muller(words[2], words[3], lanes, normals[2], normals[3]);
  }
};

}  // namespace erdfast::ERDFAST_ARCH
