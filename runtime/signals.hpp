#pragma once
// StopFlag: lets a job end cleanly after its current step when a signal asks for it.
// ignore_broken_pipes: a reader that leaves is an error, not the end of the process.

namespace lshmoe {

/// While it lives, SIGUSR1, SIGTERM and SIGINT set a flag instead of ending the process. SIGTERM
/// and SIGINT also abandon the step that runs (see abandon.hpp): who sends them does not wait for
/// long, mpirun for one second. A second SIGINT or SIGTERM ends the process at once, so that a
/// stuck program can still be interrupted. One at a time.
class StopFlag {
 public:
  StopFlag();
  ~StopFlag();  ///< puts the former handlers back
  StopFlag(const StopFlag&) = delete;
  StopFlag& operator=(const StopFlag&) = delete;

  /// True once one of the signals came to this process. Local, async-signal-safe.
  [[nodiscard]] bool requested() const;
};

/// From now on writing to a pipe that nobody reads any more fails (EPIPE) instead of ending the
/// process by SIGPIPE. First thing in main. Local.
void ignore_broken_pipes();

}  // namespace lshmoe
