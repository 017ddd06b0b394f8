// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the llmserve project

// Vectors of the widest kind there is, and what is done with them everywhere.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kAccumulators = 24;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kAccumulators = 12;
#else
constexpr int kLanes = 4, kAccumulators = 16;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

struct Bfloat16 {
  uint16_t bits;
};

template <class To, class From>
To bits_of(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

float to_float(float x) { return x; }
float to_float(Bfloat16 x) { return bits_of<float>(uint32_t(x.bits) << 16); }

void store(float* to, float x) { *to = x; }
void store(Bfloat16* to, float x) {
  uint32_t bits = bits_of<uint32_t>(x);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to->bits = uint16_t(x == x ? rounded : 0x7fc0);
}

Floats load(const float* from) {
  Floats x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}

Floats load(const Bfloat16* from) {
  Halves x;
  std::memcpy(&x, from, sizeof(x));
  return bits_of<Floats>(__builtin_convertvector(x, Words) << 16);
}

// The first `count` <= kLanes, and zeros.
template <class T>
Floats load(const T* from, int64_t count) {
  T some[kLanes] = {};
  std::memcpy(some, from, count * sizeof(T));
  return load(some);
}

void store(float* to, Floats x) { std::memcpy(to, &x, sizeof(x)); }

void store(Bfloat16* to, Floats x) {
#if defined(__AVX512BF16__)
  auto halves = _mm512_cvtneps_pbh((__m512)x);
#else
  Words bits = bits_of<Words>(x);
  Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  Halves halves = __builtin_convertvector(x == x ? rounded : Words{} + 0x7fc0, Halves);
#endif
  std::memcpy(to, &halves, sizeof(halves));
}

Floats splat(float x) { return Floats{} + x; }

// Lanes of `a` and `b`, numbered through both.
Floats pick(Floats a, Floats b, Ints lanes) {
#if defined(__clang__)
  Floats picked;
  for (int i = 0; i < kLanes; ++i)
    picked[i] = lanes[i] < kLanes ? a[lanes[i]] : b[lanes[i] - kLanes];
  return picked;
#else
  return __builtin_shuffle(a, b, lanes);
#endif
}

// `a` and `b` summed by neighbours of `step` lanes, their sums interleaved in runs of `step`.
template <int step>
Floats fold(Floats a, Floats b) {
  Ints low, high;
  for (int i = 0; i < kLanes; ++i) {
    low[i] = (i / step % 2 ? kLanes : 0) + i / (2 * step) * 2 * step + i % step;
    high[i] = low[i] + step;
  }
  return pick(a, b, low) + pick(a, b, high);
}

// Lane i of the result is the sum of x[i]'s lanes.
template <int step = 1>
Floats sums(const Floats* x) {
  if constexpr (step == kLanes) {
    return x[0];
  } else {
    Floats half[kLanes / (2 * step)];
    for (int i = 0; i < kLanes / (2 * step); ++i) half[i] = fold<step>(x[2 * i], x[2 * i + 1]);
    return sums<2 * step>(half);
  }
}

float sum(Floats x) {
  float total = 0;
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) x[i] += x[i + width];
  total = x[0];
  return total;
}

// Of x <= 88; 0 below -87. Relative error under 2e-7.
Floats exponential(Floats x) {
  Floats bounded = x < -87.0f ? splat(-87.0f) : x;
  Floats shifted = bounded * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  Floats n = shifted - 12582912.0f;
  Floats r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
  Floats p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  Floats power = bits_of<Floats>((bits_of<Ints>(shifted) - 0x4b400000 + 127) << 23);
  return x < -87.0f ? Floats{} : p * power;
}

enum Act { kNone, kSilu, kGeluTanh };

// act(gate) * up. NaN stays NaN.
Floats gated(Floats gate, Floats up, int act) {
  Floats inner = gate;
  if (act == kGeluTanh) inner = 1.5957691216f * (gate + 0.044715f * gate * gate * gate);
  Floats size = inner < 0 ? inner : -inner;
  Floats e = exponential(size);
  Floats sigmoid = (inner < 0 ? e : splat(1.0f)) / (1.0f + e);
  return inner == inner ? gate * sigmoid * up : inner;
}

template <class T>
float inverse_rms(const T* x, int64_t size, float eps) {
  Floats squares{};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    Floats part = load(x + i);
    squares += part * part;
  }
  float total = sum(squares);
  for (; i < size; ++i) total += to_float(x[i]) * to_float(x[i]);
  return 1.0f / std::sqrt(total / float(size) + eps);
}

// to = x * scale * weight; without weight a conversion.
template <class X, class W, class To>
void scaled(const X* x, float scale, const W* weight, To* to, int64_t size) {
  int64_t i = 0;
  if (!weight) {
    for (; i + kLanes <= size; i += kLanes) store(to + i, load(x + i));
    for (; i < size; ++i) store(to + i, to_float(x[i]));
    return;
  }
  for (; i + kLanes <= size; i += kLanes) store(to + i, load(x + i) * scale * load(weight + i));
  for (; i < size; ++i) store(to + i, to_float(x[i]) * scale * to_float(weight[i]));
}

template <class Use>
void with_type(int is_bfloat16, const Use& use) {
  if (is_bfloat16)
    use(Bfloat16{});
  else
    use(float{});
}

}  // namespace
