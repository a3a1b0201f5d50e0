#pragma once
// Where the time of a GPU's stream goes in encode and decode. Nothing is recorded, and a
// thread-local pointer is all that is read, unless a StreamPhases is alive in the thread.

#include <torch/torch.h>

#include <chrono>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace lshmoe::cuda {

/// Records the phases that this thread queues on the current stream of `device` until it is
/// destroyed; one at a time. On the CPU (tests) by the clock.
class StreamPhases {
 public:
  explicit StreamPhases(at::Device device);
  ~StreamPhases();
  StreamPhases(const StreamPhases&) = delete;
  StreamPhases& operator=(const StreamPhases&) = delete;

  /// Seconds by phase, in the order of their first marks, from the first mark to now. Waits for the
  /// stream.
  [[nodiscard]] std::vector<std::pair<std::string, double>> seconds();

 private:
  friend void mark_phase(const char* name);
  struct Mark {
    const char* name;
    std::shared_ptr<c10::Event> event;
    std::chrono::steady_clock::time_point time;
  };
  void mark(const char* name);

  at::Device device_;
  std::vector<Mark> marks_;
};

/// What is queued from here to the next mark is this phase's.
void mark_phase(const char* name);

}  // namespace lshmoe::cuda
