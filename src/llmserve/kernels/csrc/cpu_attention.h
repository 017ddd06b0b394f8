// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the llmserve project

// Attention of rows of one token over the paged cache, and what comes before it.

#pragma once

#include <algorithm>
#include <cmath>

#include "cpu_threads.h"
#include "cpu_vectors.h"

namespace {

constexpr int64_t kKeys = 128;  // of a part of a row's context, softmaxed by itself
constexpr int64_t kPartialFloats = 1 << 18;

struct Attention {
  const void* query;  // [rows, heads, size], rows `stride` elements apart
  const void* cache;  // [blocks, 2, kv_heads, block_size, size]
  const int32_t* table;
  const int32_t* lengths;
  void* out;
  int64_t rows, heads, kv_heads, size, block_size, stride, table_stride, window;
  float scale, softcap;  // a softcap of 0: none
};

// to = sum of weights[i] * (rows[i] + offset), `width` vectors wide
template <int width, class T>
void mix(const float* weights, const T* const* rows, int64_t offset, int64_t count, float* to) {
  Floats total[width] = {};
  for (int64_t i = 0; i < count; ++i)
    for (int d = 0; d < width; ++d) total[d] += weights[i] * load(rows[i] + offset + d * kLanes);
  for (int d = 0; d < width; ++d) store(to + d * kLanes, total[d]);
}

// Of one KV head and at most kKeys keys: the group's weighted sums of values at `to` [group, size],
// the largest scores and the sums of weights at `top` and `mass`.
template <class T>
void attend(const Attention& a, int64_t row, int64_t head, int64_t low, int64_t high, float* to,
            float* top, float* mass) {
  int64_t group = a.heads / a.kv_heads, size = a.size, side = a.block_size * size;
  const T* cache = static_cast<const T*>(a.cache);
  const T* query = static_cast<const T*>(a.query) + row * a.stride + head * group * size;
  const int32_t* table = a.table + row * a.table_stride;
  float* weights = scratch<Attention>(group * (kKeys + size));
  float* q = weights + group * kKeys;
  for (int64_t g = 0; g < group; ++g)
    scaled(query + g * size, 1.0f, static_cast<const T*>(nullptr), q + g * size, size);
  auto keys_of = [&](int64_t key) {
    return cache + (int64_t(table[key / a.block_size]) * 2 * a.kv_heads + head) * side +
           key % a.block_size * size;
  };
  const T* keys[kKeys];
  for (int64_t key = low; key < high; ++key) keys[key - low] = keys_of(key);
  int64_t count = high - low;
  for (int64_t first = 0; first < count; first += kLanes)
    for (int64_t g = 0; g < group; ++g) {
      Floats part[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const T* key = keys[std::min(first + i, count - 1)];
        part[i] = Floats{};
        for (int64_t d = 0; d < size; d += kLanes)
          part[i] += load(q + g * size + d) * load(key + d);
      }
      store(weights + g * kKeys + first, sums(part) * a.scale);
    }
  for (int64_t g = 0; g < group; ++g) {
    float* w = weights + g * kKeys;
    if (a.softcap != 0)
      for (int64_t i = 0; i < count; ++i) w[i] = a.softcap * std::tanh(w[i] / a.softcap);
    float most = w[0], total = 0;
    for (int64_t i = 1; i < count; ++i) most = w[i] > most ? w[i] : most;
    for (int64_t i = count; i < kKeys && i % kLanes; ++i) w[i] = -INFINITY;
    for (int64_t i = 0; i < count; i += kLanes) {
      Floats e = exponential(load(w + i) - most);
      store(w + i, e);
      total += sum(e);
    }
    top[g] = most;
    mass[g] = total;
  }
  int64_t values = a.kv_heads * side;
  for (int64_t g = 0; g < group; ++g) {
    int64_t d = 0;
    for (; d + 4 * kLanes <= size; d += 4 * kLanes)
      mix<4>(weights + g * kKeys, keys, values + d, count, to + g * size + d);
    for (; d < size; d += kLanes)
      mix<1>(weights + g * kKeys, keys, values + d, count, to + g * size + d);
  }
}

// Of as many rows as leave no more behind than a cache holds.
template <class T>
void attend_rows(const Attention& a) {
  int64_t group = a.heads / a.kv_heads, longest = 1;
  for (int64_t row = 0; row < a.rows; ++row) longest = std::max<int64_t>(longest, a.lengths[row]);
  int64_t parts = (longest + kKeys - 1) / kKeys;
  int64_t part_size = group * (a.size + 2);
  float* partial = scratch<std::vector<Attention>>(a.rows * a.kv_heads * parts * part_size);
  auto at = [&](int64_t row, int64_t head, int64_t part) {
    return partial + ((row * a.kv_heads + head) * parts + part) * part_size;
  };
  auto first_key = [&](int64_t row) {
    return a.window ? std::max<int64_t>(a.lengths[row] - a.window, 0) : int64_t(0);
  };
  int64_t heads = a.rows * a.kv_heads;
  share(heads * parts, heads * longest > 256, [&](int64_t i) {
    int64_t part = i / heads, row = i % heads / a.kv_heads, head = i % a.kv_heads;
    int64_t low = std::max(part * kKeys, first_key(row));
    int64_t high = std::min<int64_t>((part + 1) * kKeys, a.lengths[row]);
    if (low >= high) return;
    float* to = at(row, head, part);
    attend<T>(a, row, head, low, high, to, to + group * a.size, to + group * (a.size + 1));
  });
  share(heads, heads * parts > 64, [&](int64_t i) {
    int64_t row = i / a.kv_heads, head = i % a.kv_heads;
    int64_t low = first_key(row) / kKeys, high = (a.lengths[row] + kKeys - 1) / kKeys;
    for (int64_t g = 0; g < group; ++g) {
      T* out = static_cast<T*>(a.out) + (row * a.heads + head * group + g) * a.size;
      float most = -INFINITY, mass = 0;
      for (int64_t part = low; part < high; ++part)
        most = std::max(most, at(row, head, part)[group * a.size + g]);
      for (int64_t part = low; part < high; ++part) {
        float* from = at(row, head, part);
        mass += from[group * (a.size + 1) + g] * std::exp(from[group * a.size + g] - most);
      }
      for (int64_t d = 0; d < a.size; d += kLanes) {
        Floats total{};
        for (int64_t part = low; part < high; ++part) {
          float* from = at(row, head, part);
          total += load(from + g * a.size + d) * std::exp(from[group * a.size + g] - most);
        }
        store(out + d, total / mass);
      }
    }
  });
}

template <class T>
void attend_all(const Attention& a) {
  int64_t longest = *std::max_element(a.lengths, a.lengths + a.rows);
  int64_t some = (longest / kKeys + 1) * a.heads * (a.size + 2);
  some = std::max<int64_t>(kPartialFloats / some, 1);
  for (int64_t row = 0; row < a.rows; row += some) {
    Attention part = a;
    part.query = static_cast<const T*>(a.query) + row * a.stride;
    part.table += row * a.table_stride;
    part.lengths += row;
    part.out = static_cast<T*>(a.out) + row * a.heads * a.size;
    part.rows = std::min(some, a.rows - row);
    attend_rows<T>(part);
  }
}

struct Rope {
  void* heads;  // [tokens, all_heads, size]: query, key, value
  const int64_t* positions;
  const int64_t* slots;
  const float* table;  // [positions, rotated]: cosines, then sines
  void* cache;         // [blocks, 2, kv_heads, block_size, size]
  const void* query_norm;
  const void* key_norm;
  float eps;
  int64_t tokens, all_heads, kv_heads, size, rotated, block_size;
};

template <class T, class N>
void turn_and_write(const Rope& r) {
  int64_t heads = r.all_heads - 2 * r.kv_heads, half = r.rotated / 2;
  share(r.tokens, r.tokens * r.all_heads * r.size > 1 << 15, [&](int64_t token) {
    const float* cos = r.table + r.positions[token] * r.rotated;
    const float* sin = cos + half;
    int64_t slot = r.slots[token];
    for (int64_t head = 0; head < r.all_heads; ++head) {
      T* x = static_cast<T*>(r.heads) + (token * r.all_heads + head) * r.size;
      if (head < heads + r.kv_heads) {
        const void* norm = head < heads ? r.query_norm : r.key_norm;
        if (norm) scaled(x, inverse_rms(x, r.size, r.eps), static_cast<const N*>(norm), x, r.size);
        int64_t i = 0;
        for (; i + kLanes <= half; i += kLanes) {
          Floats a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
          store(x + i, a * c - b * s);
          store(x + half + i, b * c + a * s);
        }
        for (; i < half; ++i) {
          float a = to_float(x[i]), b = to_float(x[half + i]);
          store(x + i, a * cos[i] - b * sin[i]);
          store(x + half + i, b * cos[i] + a * sin[i]);
        }
      }
      if (head >= heads) {
        int64_t side = slot / r.block_size * 2 * r.kv_heads + head - heads;
        T* to = static_cast<T*>(r.cache) + (side * r.block_size + slot % r.block_size) * r.size;
        std::memcpy(to, x, r.size * sizeof(T));
      }
    }
  });
}

}  // namespace
