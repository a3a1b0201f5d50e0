#include "lshmoe/compress/phases.hpp"

#include <time.h>

#include <algorithm>
#include <limits>

#include "lshmoe/runtime/error.hpp"

namespace lshmoe {

namespace detail {
constinit thread_local PhaseRecorder* phase_recorder = nullptr;
}

std::string_view name_of(Phase phase) {
  constexpr std::array<std::string_view, kPhases> kNames{
      "other",    "load", "plan",     "project",  "nearest", "product",     "order",  "step_search",
      "quantize", "pack", "assemble", "checksum", "unpack",  "reconstruct", "scatter"};
  return kNames[static_cast<std::size_t>(phase)];
}

double thread_seconds() {
  timespec now{};
  LSHMOE_ASSERT(clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now) == 0);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

PhaseRecorder::Reading PhaseRecorder::read() {
  return {thread_seconds(), std::chrono::steady_clock::now()};
}

PhaseRecorder::PhaseRecorder() {
  LSHMOE_ASSERT(detail::phase_recorder == nullptr);
  // The least of many: no interruption, caches warm.
  constexpr int kReadings = 50;
  own_thread_ = own_wall_ = std::numeric_limits<double>::infinity();
  since_ = read();
  for (int i = 0; i < kReadings; ++i) {
    const Reading before = since_;
    switch_to(Phase::other);
    own_thread_ = std::min(own_thread_, since_.thread - before.thread);
    own_wall_ =
        std::min(own_wall_, std::chrono::duration<double>(since_.wall - before.wall).count());
  }
  costs_ = {};
  detail::phase_recorder = this;
  since_ = read();
}
PhaseRecorder::~PhaseRecorder() { detail::phase_recorder = nullptr; }

Phase PhaseRecorder::switch_to(Phase phase) {
  const Reading now = read();
  PhaseCost& cost = costs_[static_cast<std::size_t>(phase_)];
  cost.seconds += std::max(0.0, now.thread - since_.thread - own_thread_);
  cost.wall_seconds +=
      std::max(0.0, std::chrono::duration<double>(now.wall - since_.wall).count() - own_wall_);
  since_ = now;
  const Phase before = phase_;
  phase_ = phase;
  return before;
}

const std::array<PhaseCost, kPhases>& PhaseRecorder::costs() {
  switch_to(phase_);
  return costs_;
}

}  // namespace lshmoe
