// Sixteen lanes at a time, on AVX-512, AVX2 or plain C++; a lane is an output row, a cache position
// or an element of a head. `F` holds 16 floats, `I` 16 int32.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(FF_PORTABLE)
#define FF_ISA "portable"
#elif defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__) && !defined(FF_AVX2)
#define FF_ISA "avx512"
#define FF_512 1
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define FF_ISA "avx2"
#define FF_256 1
#else
#define FF_ISA "portable"
#define FF_PORTABLE 1
#endif

#ifndef FF_PORTABLE
#include <immintrin.h>
#endif

namespace ff {

constexpr int LANES = 16;

inline float half_to_float(uint16_t h) {  // scales: normal, subnormal and zero; never inf or NaN
  const uint32_t sign = uint32_t(h & 0x8000) << 16;
  const uint32_t exponent = (h >> 10) & 31, mantissa = h & 1023;
  float value;
  if (exponent == 0) {
    value = float(mantissa) * 0x1p-24f;
    return sign ? -value : value;
  }
  const uint32_t bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float bf16_to_float(uint16_t h) {
  const uint32_t bits = uint32_t(h) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint16_t float_to_bf16(float value) {  // to nearest even; a NaN stays one
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16) | 0x40;
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#if defined(FF_512)

struct F { __m512 v; };
struct I { __m512i v; };
inline F zero() { return {_mm512_setzero_ps()}; }
inline I izero() { return {_mm512_setzero_si512()}; }
inline F all(float x) { return {_mm512_set1_ps(x)}; }
inline F load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
inline F operator+(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F operator-(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F operator*(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F operator/(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F vmax(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F vmin(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F nearest(F a) { return {_mm512_roundscale_ps(a.v, 8)}; }
inline F power_of_two(F n) {  // 2^n of whole n
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23))};
}
inline bool any_nan(F a) { return _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q) != 0; }
inline float sum(F a) { return _mm512_reduce_add_ps(a.v); }
inline float largest(F a) { return _mm512_reduce_max_ps(a.v); }
inline F load_bf16(const uint16_t* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
}
inline F load_half(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
inline F load_bytes(const uint8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}
inline F to_float(I a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline I to_int(F a) { return {_mm512_cvtps_epi32(a.v)}; }  // to nearest even
inline I iall(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline I operator+(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline int32_t sum(I a) { return _mm512_reduce_add_epi32(a.v); }
inline void store_int8(int8_t* p, I a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(a.v)); }
inline bool any_over(F a, float x) { return _mm512_cmp_ps_mask(a.v, _mm512_set1_ps(x), _CMP_GT_OQ) != 0; }
// Lanes hold two bf16: acc += low * x0 + high * x1.
inline void fma_pair(const uint16_t* p, F x0, F x1, F& even, F& odd) {
  const __m512i w = _mm512_loadu_si512(p);
  even.v = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(w, 16)), x0.v, even.v);
  odd.v = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(int(0xffff0000)))), x1.v, odd.v);
}
struct X4 { __m512i v; };  // the same four int8 in every lane
inline X4 four(const int8_t* x) { int32_t b; std::memcpy(&b, x, 4); return {_mm512_set1_epi32(b)}; }
// Lanes hold four int8 weights. dpbusd wants one side unsigned: w + 128, undone by `undo8`.
inline void dot8(const int8_t* p, X4 x, I& acc) {
  const __m512i w = _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(char(0x80)));
  acc.v = _mm512_dpbusd_epi32(acc.v, w, x.v);
}
inline I undo8(I acc, int32_t sum_x) { return {_mm512_sub_epi32(acc.v, _mm512_set1_epi32(128 * sum_x))}; }
// 32 values of k for 16 rows as nibbles: a lane's byte holds k = 8 i + b (low) and 8 i + 4 + b.
// Four sums, as one product waits five cycles for the one before it.
inline I dot4(const uint8_t* p, const int8_t* x, I start) {
  const __m512i low = _mm512_set1_epi8(15);
  __m512i acc[4] = {start.v, _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
  for (int i = 0; i < 4; ++i) {
    const __m512i w = _mm512_loadu_si512(p + 64 * i);
    __m512i &even = acc[i % 2 * 2], &odd = acc[i % 2 * 2 + 1];
    even = _mm512_dpbusd_epi32(even, _mm512_and_si512(w, low), four(x + 8 * i).v);
    odd = _mm512_dpbusd_epi32(odd, _mm512_and_si512(_mm512_srli_epi16(w, 4), low), four(x + 8 * i + 4).v);
  }
  return {_mm512_add_epi32(_mm512_add_epi32(acc[0], acc[1]), _mm512_add_epi32(acc[2], acc[3]))};
}

#elif defined(FF_256)

struct F { __m256 a, b; };
struct I { __m256i a, b; };
inline F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline I izero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline F all(float x) { const __m256 v = _mm256_set1_ps(x); return {v, v}; }
inline F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, F x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
inline F operator+(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F operator-(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F operator*(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F operator/(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline F vmax(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline F vmin(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline F nearest(F x) { return {_mm256_round_ps(x.a, 8), _mm256_round_ps(x.b, 8)}; }
inline __m256 power_of_two(__m256 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
inline F power_of_two(F n) { return {power_of_two(n.a), power_of_two(n.b)}; }
inline bool any_nan(F x) {
  return _mm256_movemask_ps(_mm256_or_ps(_mm256_cmp_ps(x.a, x.a, _CMP_UNORD_Q), _mm256_cmp_ps(x.b, x.b, _CMP_UNORD_Q))) != 0;
}
inline float sum(F x) {
  const __m256 s = _mm256_add_ps(x.a, x.b);
  __m128 r = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  r = _mm_add_ps(r, _mm_movehl_ps(r, r));
  return _mm_cvtss_f32(_mm_add_ss(r, _mm_movehdup_ps(r)));
}
inline float largest(F x) {
  const __m256 s = _mm256_max_ps(x.a, x.b);
  __m128 r = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  r = _mm_max_ps(r, _mm_movehl_ps(r, r));
  return _mm_cvtss_f32(_mm_max_ss(r, _mm_movehdup_ps(r)));
}
inline __m256 load8_bf16(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
inline F load_bf16(const uint16_t* p) { return {load8_bf16(p), load8_bf16(p + 8)}; }
inline F load_half(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
inline F load_bytes(const uint8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p))),
          _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8))))};
}
inline F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline I to_int(F x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
inline I iall(int32_t x) { const __m256i v = _mm256_set1_epi32(x); return {v, v}; }
inline I operator+(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline int32_t sum(I x) {
  const __m256i s = _mm256_add_epi32(x.a, x.b);
  __m128i r = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
  r = _mm_add_epi32(r, _mm_shuffle_epi32(r, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(r, _mm_shuffle_epi32(r, 0xb1)));
}
inline void store_int8(int8_t* p, I x) {
  const __m256i pairs = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
  _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1)));
}
inline bool any_over(F x, float y) {
  const __m256 v = _mm256_set1_ps(y);
  return _mm256_movemask_ps(_mm256_or_ps(_mm256_cmp_ps(x.a, v, _CMP_GT_OQ), _mm256_cmp_ps(x.b, v, _CMP_GT_OQ))) != 0;
}
inline void fma_pair(const uint16_t* p, F x0, F x1, F& even, F& odd) {
  const __m256i high = _mm256_set1_epi32(int(0xffff0000));
  const __m256i w = _mm256_loadu_si256((const __m256i*)p), u = _mm256_loadu_si256((const __m256i*)(p + 16));
  even.a = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(w, 16)), x0.a, even.a);
  even.b = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(u, 16)), x0.b, even.b);
  odd.a = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(w, high)), x1.a, odd.a);
  odd.b = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(u, high)), x1.b, odd.b);
}
struct X4 { __m256i v; };
inline X4 four(const int8_t* x) { int32_t b; std::memcpy(&b, x, 4); return {_mm256_set1_epi32(b)}; }
// maddubs saturates at 16 bits: |w| times x with the sign of w, both at most 127, cannot reach it.
inline __m256i dot8(__m256i w, __m256i x) {
  return _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w)), _mm256_set1_epi16(1));
}
inline void dot8(const int8_t* p, X4 x, I& acc) {
  acc.a = _mm256_add_epi32(acc.a, dot8(_mm256_loadu_si256((const __m256i*)p), x.v));
  acc.b = _mm256_add_epi32(acc.b, dot8(_mm256_loadu_si256((const __m256i*)(p + 32)), x.v));
}
inline I undo8(I acc, int32_t) { return acc; }
// 15 * 127 * 2 * 8 = 30480: eight products of pairs fit into 16 bits.
inline __m256i dot4(const uint8_t* p, const int8_t* x) {
  const __m256i low = _mm256_set1_epi8(15);
  __m256i sum = _mm256_setzero_si256();
  for (int i = 0; i < 4; ++i) {
    const __m256i w = _mm256_loadu_si256((const __m256i*)(p + 64 * i));
    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(_mm256_and_si256(w, low), four(x + 8 * i).v));
    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(w, 4), low), four(x + 8 * i + 4).v));
  }
  return _mm256_madd_epi16(sum, _mm256_set1_epi16(1));
}
inline I dot4(const uint8_t* p, const int8_t* x, I start) {
  return {_mm256_add_epi32(start.a, dot4(p, x)), _mm256_add_epi32(start.b, dot4(p + 32, x))};
}

#else

struct F { float v[LANES]; };
struct I { int32_t v[LANES]; };
#define FF_EACH(body) do { for (int i = 0; i < LANES; ++i) { body; } } while (0)
inline F all(float x) { F r; FF_EACH(r.v[i] = x); return r; }
inline F zero() { return all(0.0f); }
inline I izero() { I r; FF_EACH(r.v[i] = 0); return r; }
inline F load(const float* p) { F r; FF_EACH(r.v[i] = p[i]); return r; }
inline void store(float* p, F a) { FF_EACH(p[i] = a.v[i]); }
inline F operator+(F a, F b) { FF_EACH(a.v[i] += b.v[i]); return a; }
inline F operator-(F a, F b) { FF_EACH(a.v[i] -= b.v[i]); return a; }
inline F operator*(F a, F b) { FF_EACH(a.v[i] *= b.v[i]); return a; }
inline F operator/(F a, F b) { FF_EACH(a.v[i] /= b.v[i]); return a; }
inline F fma(F a, F b, F c) { FF_EACH(c.v[i] += a.v[i] * b.v[i]); return c; }
inline F vmax(F a, F b) { FF_EACH(a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]); return a; }
inline F vmin(F a, F b) { FF_EACH(a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i]); return a; }
inline F nearest(F a) { FF_EACH(a.v[i] = std::nearbyint(a.v[i])); return a; }
inline F power_of_two(F n) { FF_EACH(n.v[i] = std::ldexp(1.0f, int(n.v[i]))); return n; }
inline bool any_nan(F a) { bool r = false; FF_EACH(r |= a.v[i] != a.v[i]); return r; }
inline float sum(F a) {
  for (int n = LANES / 2; n; n /= 2)
    for (int i = 0; i < n; ++i) a.v[i] += a.v[i + n];
  return a.v[0];
}
inline float largest(F a) { float r = a.v[0]; FF_EACH(r = a.v[i] > r ? a.v[i] : r); return r; }
inline F load_bf16(const uint16_t* p) { F r; FF_EACH(r.v[i] = bf16_to_float(p[i])); return r; }
inline F load_half(const uint16_t* p) { F r; FF_EACH(r.v[i] = half_to_float(p[i])); return r; }
inline F load_bytes(const uint8_t* p) { F r; FF_EACH(r.v[i] = float(p[i])); return r; }
inline F to_float(I a) { F r; FF_EACH(r.v[i] = float(a.v[i])); return r; }
inline I to_int(F a) { I r; FF_EACH(r.v[i] = int32_t(std::nearbyint(a.v[i]))); return r; }
inline I iall(int32_t x) { I r; FF_EACH(r.v[i] = x); return r; }
inline I operator+(I a, I b) { FF_EACH(a.v[i] += b.v[i]); return a; }
inline int32_t sum(I a) { int32_t r = 0; FF_EACH(r += a.v[i]); return r; }
inline void store_int8(int8_t* p, I a) { FF_EACH(p[i] = int8_t(a.v[i])); }
inline bool any_over(F a, float x) { bool r = false; FF_EACH(r |= a.v[i] > x); return r; }
inline void fma_pair(const uint16_t* p, F x0, F x1, F& even, F& odd) {
  FF_EACH(even.v[i] += bf16_to_float(p[2 * i]) * x0.v[i]);
  FF_EACH(odd.v[i] += bf16_to_float(p[2 * i + 1]) * x1.v[i]);
}
struct X4 { int32_t v[4]; };
inline X4 four(const int8_t* x) { return {{x[0], x[1], x[2], x[3]}}; }
inline void dot8(const int8_t* p, X4 x, I& acc) {
  FF_EACH(acc.v[i] += p[4 * i] * x.v[0] + p[4 * i + 1] * x.v[1] + p[4 * i + 2] * x.v[2] + p[4 * i + 3] * x.v[3]);
}
inline I undo8(I acc, int32_t) { return acc; }
inline I dot4(const uint8_t* p, const int8_t* x, I acc) {
  for (int j = 0; j < 4; ++j)
    for (int i = 0; i < LANES; ++i)
      for (int b = 0; b < 4; ++b) {
        const int w = p[64 * j + 4 * i + b];
        acc.v[i] += (w & 15) * x[8 * j + b] + (w >> 4) * x[8 * j + 4 + b];
      }
  return acc;
}

#endif

// e^x by 2^n (1 + r + ... + r^6 / 720) with |r| <= ln 2 / 2: within 2 units in the last place.
inline F exp(F x) {
  x = vmin(all(88.0f), vmax(all(-87.0f), x));  // in this order a NaN stays one
  const F n = nearest(x * all(1.44269504088896341f));
  F r = fma(n, all(-0.693359375f), x);
  r = fma(n, all(2.12194440e-4f), r);
  F p = all(1.0f / 720.0f);
  p = fma(p, r, all(1.0f / 120.0f));
  p = fma(p, r, all(1.0f / 24.0f));
  p = fma(p, r, all(1.0f / 6.0f));
  p = fma(p, r, all(0.5f));
  p = fma(p, r, all(1.0f));
  p = fma(p, r, all(1.0f));
  return p * power_of_two(n);
}

inline F silu(F x) { return x / (all(1.0f) + exp(zero() - x)); }

inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

}  // namespace ff
