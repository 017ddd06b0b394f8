// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the llmserve project

// Work on the threads that torch uses.

#pragma once

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace {

typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);
Parallel gomp_parallel = nullptr;
int (*max_threads)() = nullptr;

// Threads that are at hand for one piece of work after the other. Who comes late to one takes part
// in the next, and nobody waits for it: on a busy machine each start and end of an OpenMP region
// costs a time slice.
class Team {
 public:
  // Runs `body` here and on all that are free. It is to share its work out by itself.
  template <class Body>
  void work(Body& body) {
    call_ = [](void* data) { (*static_cast<Body*>(data))(); };
    data_ = &body;
    turn_ += kTurn;
    state_.store(turn_ | kOpen, std::memory_order_release);
    body();
    state_.fetch_and(~kOpen, std::memory_order_acq_rel);
    for (int spins = 0; state_.load(std::memory_order_acquire) & kInside;) relax(spins);
  }

  // Takes part until the end.
  void help() {
    uint64_t seen = 0;
    for (int spins = 0;;) {
      uint64_t state = state_.load(std::memory_order_acquire);
      if (state & kEnd) return;
      if (!(state & kOpen) || state / kTurn == seen) {
        relax(spins);
      } else if (state_.compare_exchange_weak(state, state + 1, std::memory_order_acquire)) {
        call_(data_);
        seen = state / kTurn;
        state_.fetch_sub(1, std::memory_order_release);
        spins = 0;
      }
    }
  }

  void end() { state_.fetch_or(kEnd, std::memory_order_release); }

 private:
  static constexpr uint64_t kInside = 0xffff, kOpen = 1 << 16, kEnd = 1 << 17, kTurn = 1 << 18;

  static void relax(int& spins) {
    if (++spins > 2000) {  // some 100 us
      sched_yield();
      return;
    }
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  std::atomic<uint64_t> state_{0};
  uint64_t turn_ = 0;
  void (*call_)(void*) = nullptr;
  void* data_ = nullptr;
};

thread_local Team* own_team = nullptr;

// Runs `body` on the caller's OpenMP threads, or on those of its team that are free.
template <class Body>
void on_all_threads(Body& body) {
  if (own_team)
    own_team->work(body);
  else
    gomp_parallel([](void* data) { (*static_cast<Body*>(data))(); }, &body, 0, 0);
}

// Runs `all`, which calls the above, with a team for its time.
template <class All>
void with_team(const All& all) {
  Team team;
  auto body = [&] {
    if (own_team != &team) return team.help();
    all();
    team.end();
  };
  own_team = &team;
  gomp_parallel([](void* data) { (*static_cast<decltype(body)*>(data))(); }, &body, 0, 0);
  own_team = nullptr;
}

constexpr int kMaxThreads = 256;

// work(i) for i in [0, count). A thread has a run of neighbours to itself, since memory is read
// fastest in order, and then helps the others, who may have begun late.
class Runs {
 public:
  explicit Runs(int64_t count) : count_(count), threads_(std::min(max_threads(), kMaxThreads)) {
    for (int i = 0; i < threads_; ++i) next_[i].at = first(i);
  }

  template <class Work>
  void join(const Work& work) {
    int own = joined_.fetch_add(1);
    for (int i = 0; i < threads_; ++i) {
      int run = (own + i) % threads_;
      for (int64_t n; (n = next_[run].at.fetch_add(1, std::memory_order_relaxed)) < first(run + 1);)
        work(n);
    }
  }

 private:
  struct alignas(64) Next {
    std::atomic<int64_t> at;
  };
  int64_t first(int run) const { return count_ * run / threads_; }
  int64_t count_;
  int threads_;
  std::atomic<int> joined_{0};
  Next next_[kMaxThreads];
};

// work(i) for i in [0, count), whichever thread is free.
template <class Work>
void share(int64_t count, bool parallel, const Work& work) {
  if (!parallel || count < 2) {
    for (int64_t i = 0; i < count; ++i) work(i);
    return;
  }
  std::atomic<int64_t> next{0};
  auto body = [&] {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(i);
  };
  on_all_threads(body);
}

// Of a thread and whoever asks, named by a type.
template <class Owner>
float* scratch(size_t count) {
  static thread_local std::vector<float> kept;
  if (kept.size() < count + 16) kept.resize(count + 16);
  uintptr_t at = reinterpret_cast<uintptr_t>(kept.data());
  return kept.data() + (-at % 64) / sizeof(float);
}

}  // namespace
