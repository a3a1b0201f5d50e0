#pragma once
// Deadline: a point in time until which one may wait.

#include <algorithm>
#include <chrono>

namespace lshmoe {

/// Runs on the monotonic clock, so that setting the system time moves no deadline.
class Deadline {
 public:
  /// Expires `seconds` from now.
  explicit Deadline(double seconds)
      : end_(Clock::now() +
             std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(
                 // More than a century would overflow the clock.
                 std::clamp(seconds, 0.0, 3.0e9)))) {}

  [[nodiscard]] bool expired() const { return Clock::now() >= end_; }
  /// Seconds left, never negative.
  [[nodiscard]] double remaining() const {
    return std::max(0.0, std::chrono::duration<double>(end_ - Clock::now()).count());
  }

 private:
  using Clock = std::chrono::steady_clock;
  Clock::time_point end_;
};

}  // namespace lshmoe
