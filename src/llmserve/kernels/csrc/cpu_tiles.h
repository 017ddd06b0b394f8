// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the llmserve project

// The same in bfloat16, by the processor's tiles of 16 x 16 results.

#pragma once

#include "cpu_product.h"

#ifdef __AMX_BF16__
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int kTile = 16;              // rows, tokens, and pairs of values of a tile
constexpr int64_t kDepth = 2 * kTile;  // values of a row that a tile holds
constexpr int64_t kTokenBlock = 512;   // whose packed input stays in the second cache

#ifdef __AMX_BF16__

bool ask_for_tiles() {
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

// Eight whole tiles, for as long as it lives.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = kTile;
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
};

// to[n * 32 + t] = a<n / 16>[n % 16] . x<t / 16>[t % 16]; `a` are 16 weight rows each, the x are
// packed. What stands `ahead` bytes behind the rows is fetched meanwhile.
template <bool both>
void tile_product(const Bfloat16* a0, const Bfloat16* a1, const uint32_t* x0, const uint32_t* x1,
                  int64_t size, int64_t ahead, float* to) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const char* next0 = reinterpret_cast<const char*>(a0) + ahead;
  const char* next1 = reinterpret_cast<const char*>(a1) + ahead;
  for (int64_t k = 0; k < size; k += kDepth) {
    if (ahead)
      for (int64_t i = 0; i < kTile; ++i) {
        __builtin_prefetch(next0 + k * 2 * kTile + i * 64, 0, 2);
        __builtin_prefetch(next1 + k * 2 * kTile + i * 64, 0, 2);
      }
    _tile_loadd(4, a0 + k, size * 2);
    _tile_loadd(6, x0 + k * kTile / 2, 64);
    _tile_loadd(5, a1 + k, size * 2);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    if (both) {
      _tile_loadd(7, x1 + k * kTile / 2, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, to, 128);
  _tile_stored(2, to + 16 * 32, 128);
  if (both) {
    _tile_stored(1, to + 16, 128);
    _tile_stored(3, to + 16 * 32 + 16, 128);
  }
}

template <int step = 1>
void transpose(Floats* x) {
  if constexpr (step < kTile) {
    Ints low, high;
    for (int i = 0; i < kTile; ++i) {
      low[i] = i / step % 2 ? kTile + i - step : i;
      high[i] = i / step % 2 ? kTile + i : i + step;
    }
    for (int i = 0; i < kTile; ++i)
      if (i / step % 2 == 0) {
        Floats a = x[i], b = x[i + step];
        x[i] = pick(a, b, low);
        x[i + step] = pick(a, b, high);
      }
    transpose<2 * step>(x);
  }
}

struct TileRow {};
struct TileInput {};

// Token `token` as column t of its packed tiles.
template <class N>
void pack(const Call& call, int64_t token, uint32_t* tiles, int64_t t) {
  int64_t size = call.product->size;
  const Bfloat16* row = static_cast<const Bfloat16*>(call.x) + token * call.stride;
  if (const N* norm = static_cast<const N*>(call.norm)) {
    Bfloat16* to = reinterpret_cast<Bfloat16*>(scratch<TileRow>(size / 2));
    scaled(row, inverse_rms(row, size, call.eps), norm, to, size);
    row = to;
  }
  for (int64_t k = 0; k < size / 2; ++k)
    std::memcpy(tiles + k * kTile + t, row + 2 * k, sizeof(uint32_t));
}

// act(x W^T + bias) + residual of 16 columns from `first` on, of `tokens` <= 16 tokens.
template <class Out>
void finish_tile(const Call& call, const float* gate, const float* up, int64_t token,
                 int64_t tokens, int64_t first, int64_t width) {
  const Bfloat16* bias = static_cast<const Bfloat16*>(call.product->bias);
  const Out* residual = static_cast<const Out*>(call.residual);
  int64_t count = std::min<int64_t>(kTile, width - first);
  Floats x[kTile], other[kTile];
  for (int n = 0; n < kTile; ++n) x[n] = load(gate + n * 32);
  transpose(x);
  if (call.act) {
    for (int n = 0; n < kTile; ++n) other[n] = load(up + n * 32);
    transpose(other);
  }
  for (int64_t t = 0; t < tokens; ++t) {
    Floats value = x[t];
    if (bias) value += load(bias + first, count);
    if (call.act) {
      Floats second = other[t];
      if (bias) second += load(bias + width + first, count);
      value = gated(value, second, call.act);
    }
    int64_t at = (token + t) * width + first;
    if (residual) value += load(residual + at, count);
    Out* out = static_cast<Out*>(call.out) + at;
    if (count == kTile) {
      store(out, value);
    } else {
      for (int64_t i = 0; i < count; ++i) store(out + i, value[i]);
    }
  }
}

template <class N, class Out>
void multiply_tiles(const Call& call) {
  const Product& product = *call.product;
  const Bfloat16* weight = static_cast<const Bfloat16*>(product.weight);
  int64_t size = product.size, width = call.act ? product.rows / 2 : product.rows;
  int64_t columns = call.act ? kTile : 2 * kTile, units = (width + columns - 1) / columns;
  int64_t pair_words = size / 2 * kTile;
  for (int64_t start = 0; start < call.tokens; start += kTokenBlock) {
    int64_t tokens = std::min(kTokenBlock, call.tokens - start);
    int64_t tiles = (tokens + kTile - 1) / kTile;
    bool few = tiles <= 2;  // each thread packs them for itself
    auto input = [&] {
      return reinterpret_cast<uint32_t*>(scratch<TileInput>(tiles * pair_words));
    };
    uint32_t* packed = nullptr;
    auto pack_tile = [&](uint32_t* x, int64_t tile) {
      for (int64_t t = tile * kTile; t < std::min(tokens, (tile + 1) * kTile); ++t)
        pack<N>(call, start + t, x + tile * pair_words, t % kTile);
    };
    if (!few) {
      packed = input();
      share(tiles, true, [&](int64_t tile) { pack_tile(packed, tile); });
    }
    Runs runs(units);
    auto body = [&] {
      uint32_t* x = packed;
      if (few) {
        x = input();
        for (int64_t tile = 0; tile < tiles; ++tile) pack_tile(x, tile);
      }
      Tiles configured;
      alignas(64) float to[32 * 32];
      runs.join([&](int64_t unit) {
        int64_t first = unit * columns;
        int64_t second = call.act ? width + first : first + kTile;
        const Bfloat16* a[2];
        int64_t at[2] = {first, second}, end[2] = {width, call.act ? 2 * width : width};
        for (int i = 0; i < 2; ++i) {
          a[i] = weight + at[i] * size;
          if (at[i] + kTile <= end[i]) continue;
          Bfloat16* some =
              reinterpret_cast<Bfloat16*>(scratch<Tiles>(kTile * size)) + i * kTile * size;
          std::memset(some, 0, kTile * size * sizeof(*some));
          if (at[i] < end[i]) std::memcpy(some, a[i], (end[i] - at[i]) * size * sizeof(*some));
          a[i] = some;
        }
        int64_t ahead = (call.act ? kTile : 2 * kTile) * size * int64_t(sizeof(Bfloat16));
        for (int64_t tile = 0; tile < tiles; tile += 2) {
          const uint32_t* xs = x + tile * pair_words;
          if (tile + 1 < tiles)
            tile_product<true>(a[0], a[1], xs, xs + pair_words, size, tile ? 0 : ahead, to);
          else
            tile_product<false>(a[0], a[1], xs, xs, size, tile ? 0 : ahead, to);
          for (int64_t i = 0; i < 2 && tile + i < tiles; ++i) {
            int64_t token = start + (tile + i) * kTile;
            int64_t some = std::min<int64_t>(kTile, start + tokens - token);
            const float *low = to + i * kTile, *high = low + kTile * 32;
            finish_tile<Out>(call, low, high, token, some, first, width);
            if (!call.act && second < width)
              finish_tile<Out>(call, high, high, token, some, second, width);
          }
        }
      });
    };
    on_all_threads(body);
  }
}

#else

bool ask_for_tiles() { return false; }

template <class N, class Out>
void multiply_tiles(const Call&) {}

#endif

}  // namespace
