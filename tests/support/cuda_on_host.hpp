#pragma once
// Runs CUDA kernels on the CPU, for tests on machines without a GPU: include this, then the .cu
// files with the kernels and their launchers, as plain C++.
//
// The threads of a block are fibres, so that barriers and shuffles meet as on a GPU; blocks run one
// after another. A barrier that not all threads reach stops the test. What is not shown: races,
// the memory model, and the GPU's own arithmetic (all kernels use IEEE operations, none fused).

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
// One block at a time: what its threads share may be static.
#define __shared__ static
#define __restrict__
#define __launch_bounds__(...)
// The launchers of the library stay beside those that the test includes.
#define cuda cuda_on_host

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned x_size, unsigned y_size = 1) : x(x_size), y(y_size) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace lshmoe::testing {

/// The threads of one block.
class Fibres {
 public:
  static Fibres& instance() {
    static Fibres fibres;
    return fibres;
  }

  void run(dim3 grid, int block, std::size_t shared, std::function<void()> kernel) {
    check(block % 32 == 0 && block <= 1024, "a block is not of whole warps");
    gridDim = grid;
    blockDim = dim3(static_cast<unsigned>(block));
    kernel_ = std::move(kernel);
    threads_.resize(static_cast<std::size_t>(block));
    for (auto& thread : threads_) {
      if (!thread) thread = std::make_unique<Thread>();
    }
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        // Leftovers of other blocks must not matter.
        shared_.assign(shared + 64, std::uint8_t{0xCC});
        blockIdx.x = x;
        blockIdx.y = y;
        run_block();
      }
    }
  }

  void sync_threads() {
    ++arrived_;
    wait(&arrived_, ++current_->barriers * static_cast<std::int64_t>(threads_.size()));
  }
  void sync_warp() { meet(); }
  template <class T>
  T shuffle(T value, int from) {
    static_assert(sizeof(T) <= 8);
    Warp& warp = warp_of(current_);
    auto& slots = warp.slot[current_->meetings % 2];  // the other half may still be read
    std::memcpy(&slots[threadIdx.x % 32], &value, sizeof(T));
    meet();
    std::memcpy(&value, &slots[static_cast<unsigned>(from) % 32], sizeof(T));
    return value;
  }
  void* shared() {
    const auto address = reinterpret_cast<std::uintptr_t>(shared_.data());
    return reinterpret_cast<void*>((address + 15) / 16 * 16);
  }

 private:
  static constexpr std::size_t kStack = 256 * 1024;
  struct Thread {
    std::vector<char> stack = std::vector<char>(kStack);
    ucontext_t start{};
    jmp_buf at{};
    bool started = false, done = false;
    const std::int64_t* counter = nullptr;  // waits until it is at least `target`
    std::int64_t target = 0, barriers = 0, meetings = 0;
    unsigned number = 0;
  };
  struct Warp {
    std::int64_t arrived = 0;
    std::uint64_t slot[2][32] = {};
  };

  std::function<void()> kernel_;
  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<Warp> warps_;
  std::vector<std::uint8_t> shared_;
  std::int64_t arrived_ = 0;
  Thread* current_ = nullptr;
  jmp_buf scheduler_{};
  ucontext_t main_{};

  static void check(bool condition, const char* what) {
    if (condition) return;
    std::fprintf(stderr, "cuda_on_host: %s\n", what);
    std::abort();
  }
  Warp& warp_of(const Thread* thread) { return warps_[thread->number / 32]; }
  void meet() {
    Warp& warp = warp_of(current_);
    ++warp.arrived;
    wait(&warp.arrived, ++current_->meetings * 32);
  }

  void run_block() {
    arrived_ = 0;
    warps_.assign(threads_.size() / 32, Warp{});
    for (std::size_t i = 0; i < threads_.size(); ++i) {
      Thread& thread = *threads_[i];
      thread.started = thread.done = false;
      thread.counter = nullptr;
      thread.barriers = thread.meetings = 0;
      thread.number = static_cast<unsigned>(i);
    }
    for (std::size_t left = threads_.size(); left > 0;) {
      bool moved = false;
      for (auto& thread : threads_) {
        if (thread->done || (thread->counter && *thread->counter < thread->target)) continue;
        resume(thread.get());
        moved = true;
        left -= thread->done;
      }
      check(moved, "threads wait for others that never come");
    }
  }

  // Contexts only start the fibres: swapping them costs a system call each.
  void resume(Thread* thread) {
    current_ = thread;
    threadIdx.x = thread->number;
    if (_setjmp(scheduler_) != 0) return;
    if (thread->started) _longjmp(thread->at, 1);
    thread->started = true;
    getcontext(&thread->start);
    thread->start.uc_stack.ss_sp = thread->stack.data();
    thread->start.uc_stack.ss_size = thread->stack.size();
    thread->start.uc_link = nullptr;
    makecontext(&thread->start, &Fibres::enter, 0);
    setcontext(&thread->start);
  }
  static void enter() {
    Fibres& fibres = instance();
    fibres.kernel_();
    fibres.current_->done = true;
    _longjmp(fibres.scheduler_, 1);
  }
  void wait(const std::int64_t* counter, std::int64_t target) {
    Thread* me = current_;
    me->counter = counter;
    me->target = target;
    if (*counter >= target) return;
    if (_setjmp(me->at) == 0) _longjmp(scheduler_, 1);
  }
};

}  // namespace lshmoe::testing

inline void __syncthreads() { lshmoe::testing::Fibres::instance().sync_threads(); }
inline void __syncwarp(unsigned = 0xFFFFFFFFu) { lshmoe::testing::Fibres::instance().sync_warp(); }
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return lshmoe::testing::Fibres::instance().shuffle(value, lane);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return __shfl_sync(mask, value, static_cast<int>(threadIdx.x % 32) ^ bits);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by) {
  const unsigned lane = threadIdx.x % 32;
  return __shfl_sync(mask, value, static_cast<int>(lane + by < 32 ? lane + by : lane));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by) {
  const unsigned lane = threadIdx.x % 32;
  return __shfl_sync(mask, value, static_cast<int>(lane >= by ? lane - by : lane));
}
template <class T>
T atomicMin(T* at, std::type_identity_t<T> value) {
  const T before = *at;
  *at = std::min(before, value);
  return before;
}
template <class T>
T atomicAdd(T* at, std::type_identity_t<T> value) {
  const T before = *at;
  *at = before + value;
  return before;
}
template <class T>
T atomicOr(T* at, std::type_identity_t<T> value) {
  const T before = *at;
  *at = before | value;
  return before;
}
template <class T>
T atomicExch(T* at, std::type_identity_t<T> value) {
  const T before = *at;
  *at = value;
  return before;
}
inline int __clz(int value) { return std::countl_zero(static_cast<unsigned>(value)); }

struct CUstream_st;

namespace lshmoe::kernels::cuda {

// stream.hpp may have been included before the renaming.
using Stream = CUstream_st*;

template <class... Parameters, class... Arguments>
void launch(const char*, void (*kernel)(Parameters...), dim3 grid, int block, std::size_t shared,
            CUstream_st*, Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0) return;
  testing::Fibres::instance().run(grid, block, shared, [=] { kernel(arguments...); });
}

}  // namespace lshmoe::kernels::cuda
