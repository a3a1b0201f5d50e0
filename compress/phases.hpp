#pragma once
// Where the time of encode and decode goes. Nothing is timed, and a thread-local pointer is all
// that is read, unless a PhaseRecorder is alive in the thread.

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace lshmoe {

enum class Phase : std::uint8_t {
  other,
  load,         ///< norms of the rows
  plan,         ///< a sample of the rows, clusters: how the group is coded
  project,      ///< rows times the projection
  nearest,      ///< nearest centroids in the projection
  product,      ///< rows times the basis
  order,        ///< rows in coding order
  step_search,  ///< of the largest steps that keep the bounds
  quantize,     ///< and the check of the true error
  pack,         ///< alphabets, mixed radix
  assemble,     ///< rows into parcels
  checksum,
  unpack,       ///< alphabets, mixed radix
  reconstruct,  ///< base + step * q, the cast to the row's dtype
  scatter,      ///< from coding order to the channels' own
};
inline constexpr std::size_t kPhases = static_cast<std::size_t>(Phase::scatter) + 1;
/// Name as written above.
[[nodiscard]] std::string_view name_of(Phase phase);

/// bytes: what the phase must read and write, each once; flops: additions and multiplications of
/// its products. 0: not said.
struct PhaseCost {
  double seconds = 0;  ///< that this thread computed: on a busy machine less than the next
  double wall_seconds = 0;
  std::int64_t bytes = 0;
  std::int64_t flops = 0;
};

/// Seconds that this thread has computed since it began.
[[nodiscard]] double thread_seconds();

/// Times the phases that run in this thread until it is destroyed; one recorder at a time. What a
/// reading of the clocks takes (about a microsecond) is measured first and taken off.
class PhaseRecorder {
 public:
  PhaseRecorder();
  ~PhaseRecorder();
  PhaseRecorder(const PhaseRecorder&) = delete;
  PhaseRecorder& operator=(const PhaseRecorder&) = delete;

  /// Up to now; they sum up to the time since construction, less the recorder's own.
  [[nodiscard]] const std::array<PhaseCost, kPhases>& costs();

 private:
  friend class PhaseScope;
  Phase switch_to(Phase phase);

  struct Reading {
    double thread = 0;
    std::chrono::steady_clock::time_point wall;
  };
  [[nodiscard]] static Reading read();

  std::array<PhaseCost, kPhases> costs_{};
  Phase phase_ = Phase::other;
  Reading since_;
  double own_thread_ = 0, own_wall_ = 0;  // of one reading
};

namespace detail {
extern constinit thread_local PhaseRecorder* phase_recorder;
}

/// The time from here to its destruction is the phase's, less that of timers inside.
class PhaseScope {
 public:
  explicit PhaseScope(Phase phase, std::int64_t bytes = 0, std::int64_t flops = 0)
      : recorder_(detail::phase_recorder), phase_(phase) {
    if (recorder_ == nullptr) return;
    before_ = recorder_->switch_to(phase);
    add_bytes(bytes);
    recorder_->costs_[static_cast<std::size_t>(phase)].flops += flops;
  }
  /// Bytes that show on the way.
  void add_bytes(std::int64_t bytes) {
    if (recorder_ != nullptr) recorder_->costs_[static_cast<std::size_t>(phase_)].bytes += bytes;
  }
  ~PhaseScope() {
    if (recorder_ != nullptr) recorder_->switch_to(before_);
  }
  PhaseScope(const PhaseScope&) = delete;
  PhaseScope& operator=(const PhaseScope&) = delete;

 private:
  PhaseRecorder* recorder_;
  Phase phase_;
  Phase before_ = Phase::other;
};

}  // namespace lshmoe
