// Vectors of W floats (W/2 doubles) and their loads and stores from float32, bfloat16, float16, float64
// memory. Reads and writes only whole vectors, or the first `count` elements with load_n / store_n. GCC
// vector extensions, so that one source is AVX-512, AVX2, NEON and plain C++, and W=16 can be tested without
// AVX-512.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifndef FASTLOSS_VECTOR_BYTES
#if defined(__AVX512F__)
#define FASTLOSS_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define FASTLOSS_VECTOR_BYTES 32
#else
#define FASTLOSS_VECTOR_BYTES 16
#endif
#endif

#if defined(__aarch64__) && FASTLOSS_VECTOR_BYTES == 16
#define FASTLOSS_NEON
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define FASTLOSS_NEON_BF16  // bfmmla and bfcvtn: the sources are compiled once with them and once without
#endif
#endif

#define FASTLOSS_INLINE inline __attribute__((always_inline))
#pragma GCC diagnostic ignored "-Wpsabi"  // nothing here is called across an ABI: everything is inlined
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12, inside its own _mm512_cvtph_ps

// The ISA's namespace holds every inline function below: the linker must never merge an AVX copy with a plain
// one.
namespace fastloss {
namespace FASTLOSS_ISA {

constexpr int kBytes = FASTLOSS_VECTOR_BYTES;
constexpr int W = kBytes / 4;

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

typedef float F32V __attribute__((vector_size(kBytes)));
typedef uint32_t U32V __attribute__((vector_size(kBytes)));
typedef uint16_t U16V __attribute__((vector_size(kBytes / 2)));
typedef double F64V __attribute__((vector_size(kBytes)));
typedef uint64_t U64V __attribute__((vector_size(kBytes)));
typedef float F32HalfV __attribute__((vector_size(kBytes / 2)));

template <class S>
struct Lanes;
template <>
struct Lanes<float> {
  typedef F32V V;
  typedef U32V U;
  static constexpr int n = W;
};
template <>
struct Lanes<double> {
  typedef F64V V;
  typedef U64V U;
  static constexpr int n = W / 2;
};

template <class A, class B>
struct Same {
  static constexpr bool value = false;
};
template <class A>
struct Same<A, A> {
  static constexpr bool value = true;
};

// The dtype of arithmetic on logits of type T.
template <class T>
struct Acc {
  typedef float S;
};
template <>
struct Acc<double> {
  typedef double S;
};

template <class To, class From>
FASTLOSS_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <class V, class P>
FASTLOSS_INLINE V load_raw(const P* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

// The larger or smaller one; b where an operand is NaN. GCC 12 makes a compare and a blend of the ternary
// under AVX2, which is exactly what vmaxps and vminps do in one instruction.
template <class V>
FASTLOSS_INLINE V max_or_second(V a, V b) {
  return a > b ? a : b;
}
template <class V>
FASTLOSS_INLINE V min_or_second(V a, V b) {
  return a < b ? a : b;
}
#if defined(__AVX512F__) && FASTLOSS_VECTOR_BYTES == 64
FASTLOSS_INLINE F32V max_or_second(F32V a, F32V b) { return F32V(_mm512_max_ps(__m512(a), __m512(b))); }
FASTLOSS_INLINE F32V min_or_second(F32V a, F32V b) { return F32V(_mm512_min_ps(__m512(a), __m512(b))); }
FASTLOSS_INLINE F64V max_or_second(F64V a, F64V b) { return F64V(_mm512_max_pd(__m512d(a), __m512d(b))); }
FASTLOSS_INLINE F64V min_or_second(F64V a, F64V b) { return F64V(_mm512_min_pd(__m512d(a), __m512d(b))); }
#elif defined(__AVX2__) && FASTLOSS_VECTOR_BYTES == 32
FASTLOSS_INLINE F32V max_or_second(F32V a, F32V b) { return F32V(_mm256_max_ps(__m256(a), __m256(b))); }
FASTLOSS_INLINE F32V min_or_second(F32V a, F32V b) { return F32V(_mm256_min_ps(__m256(a), __m256(b))); }
FASTLOSS_INLINE F64V max_or_second(F64V a, F64V b) { return F64V(_mm256_max_pd(__m256d(a), __m256d(b))); }
FASTLOSS_INLINE F64V min_or_second(F64V a, F64V b) { return F64V(_mm256_min_pd(__m256d(a), __m256d(b))); }
#elif defined(__SSE2__) && FASTLOSS_VECTOR_BYTES == 16
FASTLOSS_INLINE F32V max_or_second(F32V a, F32V b) { return F32V(_mm_max_ps(__m128(a), __m128(b))); }
FASTLOSS_INLINE F32V min_or_second(F32V a, F32V b) { return F32V(_mm_min_ps(__m128(a), __m128(b))); }
FASTLOSS_INLINE F64V max_or_second(F64V a, F64V b) { return F64V(_mm_max_pd(__m128d(a), __m128d(b))); }
FASTLOSS_INLINE F64V min_or_second(F64V a, F64V b) { return F64V(_mm_min_pd(__m128d(a), __m128d(b))); }
#endif

FASTLOSS_INLINE F32V load(const float* p) { return load_raw<F32V>(p); }
FASTLOSS_INLINE F64V load(const double* p) { return load_raw<F64V>(p); }
FASTLOSS_INLINE void store(float* p, F32V v) { memcpy(p, &v, sizeof v); }
FASTLOSS_INLINE void store(double* p, F64V v) { memcpy(p, &v, sizeof v); }

// Each 16 bits as a lane of 32. GCC 12 widens a vector in two halves without these.
FASTLOSS_INLINE U32V widen_halves(const void* p) {
#if defined(__AVX512F__) && FASTLOSS_VECTOR_BYTES == 64
  return U32V(_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p))));
#elif defined(__AVX2__) && FASTLOSS_VECTOR_BYTES == 32
  return U32V(_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
#else
  return __builtin_convertvector(load_raw<U16V>(p), U32V);
#endif
}
FASTLOSS_INLINE F32V load(const BF16* p) { return bit_cast<F32V>(widen_halves(p) << 16); }

// Round to nearest even; every NaN becomes the quiet one PyTorch writes. In the upper 16 bits, above what is
// left of the others.
FASTLOSS_INLINE U32V bf16_upper_bits(F32V v) {
  U32V bits = bit_cast<U32V>(v);
  bits = bits + 0x7fffu + ((bits >> 16) & 1u);
  return v == v ? bits : U32V{} + 0x7fc00000u;
}
FASTLOSS_INLINE U32V bf16_bits(F32V v) { return bf16_upper_bits(v) >> 16; }
#if defined(__AVX2__) && FASTLOSS_VECTOR_BYTES == 32
// GCC 12 narrows through a chain of shuffles; one saturating pack is enough, the values fit.
FASTLOSS_INLINE void store(BF16* p, F32V v) {
  const __m256i bits = __m256i(bf16_bits(v));
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}
FASTLOSS_INLINE void store_two(BF16* p, F32V v0, F32V v1) {
  const __m256i packed = _mm256_packus_epi32(__m256i(bf16_bits(v0)), __m256i(bf16_bits(v1)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}
#elif defined(__AVX512F__) && FASTLOSS_VECTOR_BYTES == 64
FASTLOSS_INLINE void store(BF16* p, F32V v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(__m512i(bf16_bits(v))));
}
// Of every 32 bits of both vectors the upper 16, by one permutation.
FASTLOSS_INLINE void store_two(BF16* p, F32V v0, F32V v1) {
  typedef uint16_t Words __attribute__((vector_size(64)));
  const Words upper = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                       33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  const __m512i both =
      _mm512_permutex2var_epi16(__m512i(bf16_upper_bits(v0)), __m512i(upper), __m512i(bf16_upper_bits(v1)));
  _mm512_storeu_si512(p, both);
}
#else
FASTLOSS_INLINE void store(BF16* p, F32V v) {
  const U16V narrow = __builtin_convertvector(bf16_bits(v), U16V);
  memcpy(p, &narrow, sizeof narrow);
}
#endif

#if defined(__AVX512F__) && FASTLOSS_VECTOR_BYTES == 64
FASTLOSS_INLINE F32V load(const F16* p) {
  return bit_cast<F32V>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
FASTLOSS_INLINE void store(F16* p, F32V v) {
  const __m256i h = _mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), h);
}
#elif defined(__F16C__) && FASTLOSS_VECTOR_BYTES == 32
FASTLOSS_INLINE F32V load(const F16* p) {
  return bit_cast<F32V>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
FASTLOSS_INLINE void store(F16* p, F32V v) {
  const __m128i h = _mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), h);
}
#elif defined(FASTLOSS_NEON)
FASTLOSS_INLINE F32V load(const F16* p) {
  return F32V(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)))));
}
FASTLOSS_INLINE void store(F16* p, F32V v) {
  vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(float32x4_t(v))));
}
#else
// Shift the half's exponent and mantissa into a float's place and multiply by 2^112: exact, subnormals too.
FASTLOSS_INLINE F32V load(const F16* p) {
  const U32V h = __builtin_convertvector(load_raw<U16V>(p), U32V);
  const U32V shifted = (h & 0x7fffu) << 13;
  const U32V finite = bit_cast<U32V>(bit_cast<F32V>(shifted) * 0x1p112f);
  const U32V magnitude = shifted >= 0x0f800000u ? (shifted | 0x7f800000u) : finite;
  return bit_cast<F32V>(magnitude | ((h & 0x8000u) << 16));
}
// Round to nearest even: normals by a carry into the mantissa, subnormals by an addition that aligns them.
FASTLOSS_INLINE void store(F16* p, F32V v) {
  const U32V bits = bit_cast<U32V>(v), sign = bits & 0x80000000u, x = bits ^ sign;
  const U32V normal = (x - (112u << 23) + 0xfffu + ((x >> 13) & 1u)) >> 13;
  const U32V subnormal = bit_cast<U32V>(bit_cast<F32V>(x) + 0.5f) - 0x3f000000u;
  U32V h = x < 0x38800000u ? subnormal : normal;
  h = x >= 0x47800000u ? h * 0u + 0x7c00u : h;
  h = x > 0x7f800000u ? h * 0u + 0x7e00u : h;
  const U16V narrow = __builtin_convertvector(h | (sign >> 16), U16V);
  memcpy(p, &narrow, sizeof narrow);
}
#endif

// 2 W bfloat16 as two vectors, those at even places and those at odd ones: nothing has to change its place.
FASTLOSS_INLINE void load_even_odd(const BF16* p, F32V* even, F32V* odd) {
  const U32V pairs = load_raw<U32V>(p);
  *even = bit_cast<F32V>(pairs << 16), *odd = bit_cast<F32V>(pairs & 0xffff0000u);
}
FASTLOSS_INLINE void store_even_odd(BF16* p, F32V even, F32V odd) {
  const U32V pairs = bf16_bits(even) | (bf16_upper_bits(odd) & 0xffff0000u);
  memcpy(p, &pairs, sizeof pairs);
}

template <class T, class V>
FASTLOSS_INLINE void store_two(T* p, V v0, V v1) {
  store(p, v0);
  store(p + sizeof(V) / sizeof(v0[0]), v1);
}

template <class T>
FASTLOSS_INLINE auto load_n(const T* p, int64_t count) {
  T all[Lanes<typename Acc<T>::S>::n] = {};
  memcpy(all, p, count * sizeof(T));
  return load(all);
}

template <class T>
FASTLOSS_INLINE auto load_upto(const T* p, int64_t count) {
  return count >= Lanes<typename Acc<T>::S>::n ? load(p) : load_n(p, count);
}

template <class T, class V>
FASTLOSS_INLINE void store_n(T* p, V v, int64_t count) {
  T all[Lanes<typename Acc<T>::S>::n];
  store(all, v);
  memcpy(p, all, count * sizeof(T));
}

// One element, rounded as the vector path rounds it.
template <class T, class S>
FASTLOSS_INLINE void store_one(T* p, S value) {
  store_n(p, typename Lanes<S>::V{} + value, 1);
}

// W/2 elements as doubles.
FASTLOSS_INLINE F64V widen(const double* p) { return load(p); }
FASTLOSS_INLINE F64V widen(const float* p) { return __builtin_convertvector(load_raw<F32HalfV>(p), F64V); }

// One byte per lane, as integers. GCC 12 takes the bytes one by one through general registers without these.
template <int bytes>
struct ByteVector {
  typedef uint8_t type __attribute__((vector_size(bytes)));
};
template <class U>
FASTLOSS_INLINE U widen_bytes(const uint8_t* p) {
  return __builtin_convertvector(load_raw<typename ByteVector<sizeof(U) / sizeof(U{}[0])>::type>(p), U);
}
#if defined(__AVX512F__) && FASTLOSS_VECTOR_BYTES == 64
template <>
FASTLOSS_INLINE U32V widen_bytes<U32V>(const uint8_t* p) {
  return U32V(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
template <>
FASTLOSS_INLINE U64V widen_bytes<U64V>(const uint8_t* p) {
  return U64V(_mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
#elif defined(__AVX2__) && FASTLOSS_VECTOR_BYTES == 32
template <>
FASTLOSS_INLINE U32V widen_bytes<U32V>(const uint8_t* p) {
  return U32V(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
template <>
FASTLOSS_INLINE U64V widen_bytes<U64V>(const uint8_t* p) {
  int four;
  memcpy(&four, p, sizeof four);
  return U64V(_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four)));
}
#endif

// Whether a mask (lanes 0 or -1) has any lane set.
template <class M>
FASTLOSS_INLINE bool any_lane(M mask) {
#if defined(__AVX512F__) && FASTLOSS_VECTOR_BYTES == 64
  return _mm512_test_epi32_mask(__m512i(mask), __m512i(mask)) != 0;
#elif defined(__AVX2__) && FASTLOSS_VECTOR_BYTES == 32
  return !_mm256_testz_si256(__m256i(mask), __m256i(mask));
#elif defined(__SSE2__) && FASTLOSS_VECTOR_BYTES == 16
  return _mm_movemask_epi8(__m128i(mask)) != 0;
#elif defined(FASTLOSS_NEON)
  return vmaxvq_u32(bit_cast<uint32x4_t>(mask)) != 0;
#else
  U64V words = bit_cast<U64V>(mask);
  for (int k = 1; k < kBytes / 8; ++k) words[0] |= words[k];
  return words[0] != 0;
#endif
}

template <class V>
FASTLOSS_INLINE double sum_lanes(V v) {
  double sum = 0;
  for (unsigned i = 0; i < sizeof(V) / sizeof(v[0]); ++i) sum += v[i];
  return sum;
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
