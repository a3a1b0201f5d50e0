#include "lshmoe/compress/cuda/stream_phases.hpp"

#include <algorithm>

#include "lshmoe/runtime/error.hpp"

namespace lshmoe::cuda {
namespace {
constinit thread_local StreamPhases* recorder = nullptr;
}

StreamPhases::StreamPhases(at::Device device) : device_(device) {
  LSHMOE_ASSERT(recorder == nullptr);
  recorder = this;
}
StreamPhases::~StreamPhases() { recorder = nullptr; }

void StreamPhases::mark(const char* name) {
  Mark made{name, nullptr, std::chrono::steady_clock::now()};
  if (!device_.is_cpu()) {
    made.event = std::make_shared<c10::Event>(device_.type(), c10::EventFlag::BACKEND_DEFAULT);
    made.event->record(c10::impl::VirtualGuardImpl(device_.type()).getStream(device_));
  }
  marks_.push_back(std::move(made));
}

std::vector<std::pair<std::string, double>> StreamPhases::seconds() {
  std::vector<std::pair<std::string, double>> sums;
  if (marks_.empty()) return sums;
  mark("end");
  if (marks_.back().event) marks_.back().event->synchronize();
  for (std::size_t i = 0; i + 1 < marks_.size(); ++i) {
    const Mark &from = marks_[i], &to = marks_[i + 1];
    const double seconds = from.event ? 1e-3 * from.event->elapsedTime(*to.event)
                                      : std::chrono::duration<double>(to.time - from.time).count();
    auto at = std::find_if(sums.begin(), sums.end(),
                           [&](const auto& one) { return one.first == from.name; });
    if (at == sums.end()) at = sums.insert(sums.end(), {from.name, 0.0});
    at->second += seconds;
  }
  marks_.pop_back();
  return sums;
}

void mark_phase(const char* name) {
  if (recorder != nullptr) recorder->mark(name);
}

}  // namespace lshmoe::cuda
