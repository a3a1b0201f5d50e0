#include "lshmoe/compress/phases.hpp"

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

PhaseRecorder::PhaseRecorder() : since_(std::chrono::steady_clock::now()) {
  LSHMOE_ASSERT(detail::phase_recorder == nullptr);
  detail::phase_recorder = this;
}
PhaseRecorder::~PhaseRecorder() { detail::phase_recorder = nullptr; }

Phase PhaseRecorder::switch_to(Phase phase) {
  const auto now = std::chrono::steady_clock::now();
  costs_[static_cast<std::size_t>(phase_)].seconds +=
      std::chrono::duration<double>(now - since_).count();
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
