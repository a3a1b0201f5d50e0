#include "lshmoe/moe/phase_timer.hpp"

#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>

namespace lshmoe {

PhaseTimer::EventPtr PhaseTimer::record() const {
  auto event = std::make_shared<c10::Event>(device_.type(), c10::EventFlag::BACKEND_DEFAULT);
  event->record(c10::impl::VirtualGuardImpl(device_.type()).getStream(device_));
  return event;
}

void PhaseTimer::start(at::Device device) {
  device_ = device;
  if (device.is_cpu()) {
    since_ = Clock::now();
  } else {
    begin_ = record();
  }
}

void PhaseTimer::stop() {
  if (device_.is_cpu()) {
    seconds_ += std::chrono::duration<double>(Clock::now() - since_).count();
  } else {
    pending_.emplace_back(std::move(begin_), record());
  }
}

PhaseTimer::Span::~Span() {
  try {
    timer_.stop();
  } catch (...) {
    // A GPU that failed: the error that unwinds here, or the next call, tells it.
  }
}

double PhaseTimer::seconds() const {
  for (const auto& [begin, end] : pending_) {
    end->synchronize();
    seconds_ += 1e-3 * begin->elapsedTime(*end);
  }
  pending_.clear();
  return seconds_;
}

}  // namespace lshmoe
