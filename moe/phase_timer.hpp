#pragma once
// PhaseTimer: seconds spent in a phase, on the CPU or on a GPU's stream.

#include <torch/torch.h>

#include <chrono>
#include <memory>
#include <utility>
#include <vector>

namespace c10 {
struct Event;
}

namespace lshmoe {

/// Adds up the times between start() and stop(). On a GPU they are events on the current stream,
/// and the time is that between them, whatever the host does meanwhile. Thread-compatible.
class PhaseTimer {
 public:
  void start(at::Device device);
  /// After start(). On a GPU the stream must be of start()'s device.
  void stop();
  /// The sum so far. Waits for the GPU where one was timed.
  [[nodiscard]] double seconds() const;

  /// Times its own life.
  class Span {
   public:
    Span(PhaseTimer& timer, at::Device device) : timer_(timer) { timer_.start(device); }
    ~Span();
    Span(const Span&) = delete;
    Span& operator=(const Span&) = delete;

   private:
    PhaseTimer& timer_;
  };

 private:
  using Clock = std::chrono::steady_clock;
  using EventPtr = std::shared_ptr<c10::Event>;
  [[nodiscard]] EventPtr record() const;

  at::Device device_{at::kCPU};
  Clock::time_point since_;
  EventPtr begin_;
  mutable double seconds_ = 0.0;
  mutable std::vector<std::pair<EventPtr, EventPtr>> pending_;
};

}  // namespace lshmoe
