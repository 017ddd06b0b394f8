// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the llmserve project

// act(norm(x) W^T + bias) + residual in float32, for few tokens. The weight is read once, as it
// lies.

#pragma once

#include <algorithm>

#include "cpu_threads.h"
#include "cpu_vectors.h"

namespace {

struct Product {
  const void* weight;  // [rows, size]
  const void* bias;    // [rows], or null
  int64_t rows, size;
};

struct Call {
  const Product* product;
  const void* x;
  int64_t tokens, stride;
  const void* norm;
  float eps;
  int32_t act;
  const void* residual;
  void* out;
};

constexpr int kMaxTokens = kLanes == 8 ? 6 : 8;  // of one pass over a few weight rows
constexpr int kColumns = 12;                     // of the result, written together
constexpr int64_t kChunkBytes = 32 << 10;        // of weight that a thread takes at a time
constexpr int64_t kAhead = 3072;  // values, into the second cache: the first is too slow to fill

constexpr int rows_for(int tokens) { return 3 * tokens <= kAccumulators ? 3 : 2; }

// out[r * tokens + t] = rows[r] . x[t]
template <int tokens, int rows>
void dot(const float* const* row, const float* x, int64_t stride, int64_t size, float* out) {
  constexpr int padded = (rows * tokens + kLanes - 1) / kLanes * kLanes;
  Floats total[padded] = {};
  int64_t k = 0;
  for (; k + kLanes <= size; k += kLanes) {
    Floats w[rows];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      __builtin_prefetch(row[r] + k + kAhead, 0, 2);
      w[r] = load(row[r] + k);
    }
#pragma GCC unroll 8
    for (int t = 0; t < tokens; ++t) {
      Floats part = load(x + t * stride + k);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) total[r * tokens + t] += w[r] * part;
    }
  }
  if (k < size)
    for (int r = 0; r < rows; ++r) {
      Floats w = load(row[r] + k, size - k);
      for (int t = 0; t < tokens; ++t)
        total[r * tokens + t] += w * load(x + t * stride + k, size - k);
    }
  for (int i = 0; i < padded; i += kLanes) store(out + i, sums(total + i));
}

// kColumns results of `tokens` tokens from `first` on; sums[t * kColumns + column].
template <int tokens>
void columns(const float* weight, int64_t size, const float* x, int64_t stride, float* to) {
  constexpr int rows = rows_for(tokens);
  alignas(64) float out[kAccumulators + kLanes];
  for (int c = 0; c < kColumns; c += rows) {
    const float* row[rows];
    for (int r = 0; r < rows; ++r) row[r] = weight + (c + r) * size;
    dot<tokens, rows>(row, x, stride, size, out);
    for (int t = 0; t < tokens; ++t)
      for (int r = 0; r < rows; ++r) to[t * kColumns + c + r] = out[r * tokens + t];
  }
}

using Columns = void (*)(const float*, int64_t, const float*, int64_t, float*);

constexpr Columns kColumnsOf[] = {
    nullptr,    columns<1>, columns<2>, columns<3>, columns<4>,
    columns<5>, columns<6>, columns<7>, columns<8>,
};

// All tokens' results of the `count` <= kColumns weight rows from `weight` on.
void block(const float* weight, int64_t count, int64_t size, const float* x, int64_t stride,
           int64_t tokens, float* to) {
  int64_t passes = (tokens + kMaxTokens - 1) / kMaxTokens;
  for (int64_t pass = 0; pass < passes; ++pass) {
    int64_t first = tokens * pass / passes, last = tokens * (pass + 1) / passes;
    const float* from = x + first * stride;
    if (count == kColumns) {
      kColumnsOf[last - first](weight, size, from, stride, to + first * kColumns);
      continue;
    }
    alignas(64) float out[kLanes];
    for (int64_t t = first; t < last; ++t)
      for (int64_t c = 0; c < count; ++c) {
        const float* row = weight + c * size;
        dot<1, 1>(&row, x + t * stride, stride, size, out);
        to[t * kColumns + c] = out[0];
      }
  }
}

// The input, normalized.
const float* prepare(const Call& call) {
  const float* x = static_cast<const float*>(call.x);
  const float* norm = static_cast<const float*>(call.norm);
  if (!norm) return x;
  int64_t size = call.product->size;
  float* to = scratch<Call>(call.tokens * size);
  for (int64_t t = 0; t < call.tokens; ++t) {
    const float* row = x + t * call.stride;
    scaled(row, inverse_rms(row, size, call.eps), norm, to + t * size, size);
  }
  return to;
}

constexpr int kPadded = (kColumns + kLanes - 1) / kLanes * kLanes;

// act(x W^T + bias) + residual of `count` columns from `first` on.
void finish(const Call& call, const float* gate, const float* up, int64_t first, int64_t count) {
  const Product& product = *call.product;
  const float* bias = static_cast<const float*>(product.bias);
  int64_t width = call.act ? product.rows / 2 : product.rows;
  const float* residual = static_cast<const float*>(call.residual);
  float* out = static_cast<float*>(call.out);
  for (int64_t t = 0; t < call.tokens; ++t) {
    alignas(64) float value[kPadded] = {}, other[kPadded] = {};
    for (int64_t c = 0; c < count; ++c)
      value[c] = gate[t * kColumns + c] + (bias ? bias[first + c] : 0.0f);
    if (call.act) {
      for (int64_t c = 0; c < count; ++c)
        other[c] = up[t * kColumns + c] + (bias ? bias[width + first + c] : 0.0f);
      for (int c = 0; c < kPadded; c += kLanes)
        store(value + c, gated(load(value + c), load(other + c), call.act));
    }
    int64_t at = t * width + first;
    for (int64_t c = 0; c < count; ++c) {
      out[at + c] = residual ? value[c] + residual[at + c] : value[c];
    }
  }
}

void multiply(const Call& call) {
  const Product& product = *call.product;
  const float* weight = static_cast<const float*>(product.weight);
  int64_t size = product.size, width = call.act ? product.rows / 2 : product.rows;
  int64_t chunk = kChunkBytes / int64_t(sizeof(float) * size * (call.act ? 2 : 1));
  chunk = std::max<int64_t>(chunk / kColumns, 1) * kColumns;
  int64_t chunks = (width + chunk - 1) / chunk;
  Runs runs(chunks);
  auto body = [&] {
    const float* x = prepare(call);
    int64_t stride = x == call.x ? call.stride : size;
    float* gate = scratch<Product>(2 * call.tokens * kColumns);
    float* up = gate + call.tokens * kColumns;
    runs.join([&](int64_t i) {
      for (int64_t n = i * chunk; n < std::min((i + 1) * chunk, width); n += kColumns) {
        int64_t count = std::min<int64_t>(kColumns, width - n);
        block(weight + n * size, count, size, x, stride, call.tokens, gate);
        if (call.act) block(weight + (width + n) * size, count, size, x, stride, call.tokens, up);
        finish(call, gate, up, n, count);
      }
    });
  };
  on_all_threads(body);
}

}  // namespace
