// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the llmserve project

// What a step of few tokens does on a CPU besides torch's calls. Arithmetic is float32, storage
// float32 or bfloat16. A row's result does not depend on the rows beside it, nor on how many
// threads there are. kernels/cpu.py has the signatures and says what the arguments are.

#include "cpu_attention.h"
#include "cpu_product.h"
#include "cpu_threads.h"
#include "cpu_tiles.h"
#include "cpu_vectors.h"

extern "C" {

// `parallel` and `threads` are GOMP_parallel and omp_get_max_threads of the OpenMP runtime that
// torch has loaded. Returns whether bfloat16 can be multiplied, in rows of 32n values.
int llmserve_init(void* parallel, void* threads) {
  max_threads = reinterpret_cast<int (*)()>(threads);
  gomp_parallel = reinterpret_cast<Parallel>(parallel);
  return ask_for_tiles();
}

void llmserve_linear(const Product* product, const void* x, int64_t tokens, int64_t stride,
                     const void* norm, float eps, int act, const void* residual, void* out,
                     int x_is_bfloat16, int norm_is_bfloat16, int out_is_bfloat16) {
  Call call{product, x, tokens, stride, norm, eps, act, residual, out};
  if (x_is_bfloat16)
    with_type(norm_is_bfloat16, [&](auto n) {
      with_type(out_is_bfloat16, [&](auto o) { multiply_tiles<decltype(n), decltype(o)>(call); });
    });
  else
    multiply(call);
}

void llmserve_attention(const void* query, const void* cache, const int32_t* table,
                        const int32_t* lengths, void* out, int64_t rows, int64_t heads,
                        int64_t kv_heads, int64_t size, int64_t block_size, int64_t stride,
                        int64_t table_stride, int64_t window, float scale, float softcap,
                        int is_bfloat16) {
  Attention call{query, cache,      table,  lengths,      out,    rows,  heads,  kv_heads,
                 size,  block_size, stride, table_stride, window, scale, softcap};
  with_type(is_bfloat16, [&](auto t) { attend_all<decltype(t)>(call); });
}

void llmserve_rope(void* heads, const int64_t* positions, const int64_t* slots, const float* table,
                   void* cache, const void* query_norm, const void* key_norm, float eps,
                   int64_t tokens, int64_t all_heads, int64_t kv_heads, int64_t size,
                   int64_t rotated, int64_t block_size, int is_bfloat16, int norm_is_bfloat16) {
  Rope call{heads, positions, slots,     table,    cache, query_norm, key_norm,
            eps,   tokens,    all_heads, kv_heads, size,  rotated,    block_size};
  with_type(is_bfloat16, [&](auto t) {
    with_type(norm_is_bfloat16, [&](auto n) { turn_and_write<decltype(t), decltype(n)>(call); });
  });
}

void llmserve_rms_norm(const void* x, int64_t stride, const void* weight, float eps, void* out,
                       int64_t tokens, int64_t size, int is_bfloat16, int weight_is_bfloat16) {
  with_type(is_bfloat16, [&](auto t) {
    with_type(weight_is_bfloat16, [&](auto n) {
      using T = decltype(t);
      share(tokens, tokens * size > 1 << 15, [&](int64_t token) {
        const T* row = static_cast<const T*>(x) + token * stride;
        scaled(row, inverse_rms(row, size, eps), static_cast<const decltype(n)*>(weight),
               static_cast<T*>(out) + token * size, size);
      });
    });
  });
}

// `x` [tokens, 2 * size]: gate, up.
void llmserve_gated_act(const void* x, void* out, int64_t tokens, int64_t size, int act,
                        int is_bfloat16) {
  with_type(is_bfloat16, [&](auto t) {
    using T = decltype(t);
    share(tokens, tokens * size > 1 << 12, [&](int64_t token) {
      const T* gate = static_cast<const T*>(x) + token * 2 * size;
      const T* up = gate + size;
      T* to = static_cast<T*>(out) + token * size;
      int64_t i = 0;
      for (; i + kLanes <= size; i += kLanes)
        store(to + i, gated(load(gate + i), load(up + i), act));
      for (; i < size; ++i)
        store(to + i, gated(splat(to_float(gate[i])), splat(to_float(up[i])), act)[0]);
    });
  });
}

// Rows of `table` [rows, size] times `scale`; NaN for an id that has none.
void llmserve_embedding(const void* table, const int64_t* ids, void* out, float scale,
                        int64_t tokens, int64_t rows, int64_t size, int is_bfloat16) {
  with_type(is_bfloat16, [&](auto t) {
    using T = decltype(t);
    for (int64_t token = 0; token < tokens; ++token) {
      bool known = ids[token] >= 0 && ids[token] < rows;
      const T* row = static_cast<const T*>(table) + (known ? ids[token] : 0) * size;
      T* to = static_cast<T*>(out) + token * size;
      for (int64_t i = 0; i < size; ++i) store(to + i, known ? to_float(row[i]) * scale : NAN);
    }
  });
}

struct Step {
  int64_t function;
  int64_t at[16];  // addresses and integers in the order of the function's arguments
  float number[2];
};

// Calls recorded with more tokens, made with `tokens`.
void llmserve_run(const Step* steps, int64_t count, int64_t tokens) {
  with_team([&] {
    for (const Step* s = steps; s < steps + count; ++s) {
      const int64_t* at = s->at;
      auto read = [&](int i) { return reinterpret_cast<const void*>(at[i]); };
      auto write = [&](int i) { return reinterpret_cast<void*>(at[i]); };
      auto ints = [&](int i) { return reinterpret_cast<const int32_t*>(at[i]); };
      auto longs = [&](int i) { return reinterpret_cast<const int64_t*>(at[i]); };
      auto floats = [&](int i) { return reinterpret_cast<const float*>(at[i]); };
      const float* f = s->number;
      switch (s->function) {
        case 0:
          llmserve_linear(static_cast<const Product*>(read(0)), read(1), tokens, at[3], read(4),
                          f[0], at[5], read(6), write(7), at[8], at[9], at[10]);
          break;
        case 1:
          llmserve_attention(read(0), read(1), ints(2), ints(3), write(4), tokens, at[6], at[7],
                             at[8], at[9], at[10], at[11], at[12], f[0], f[1], at[13]);
          break;
        case 2:
          llmserve_rope(write(0), longs(1), longs(2), floats(3), write(4), read(5), read(6), f[0],
                        tokens, at[8], at[9], at[10], at[11], at[12], at[13], at[14]);
          break;
        case 3:
          llmserve_rms_norm(read(0), at[1], read(2), f[0], write(3), tokens, at[5], at[6], at[7]);
          break;
        case 4:
          llmserve_gated_act(read(0), write(1), tokens, at[3], at[4], at[5]);
          break;
        case 5:
          llmserve_embedding(read(0), longs(1), write(2), f[0], tokens, at[4], at[5], at[6]);
          break;
      }
    }
  });
}

}  // extern "C"
