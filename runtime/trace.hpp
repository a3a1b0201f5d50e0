#pragma once
// Traces of a run: a file that the Perfetto UI (and chrome://tracing) opens.

#include <string>

#include "lshmoe/runtime/error.hpp"

namespace lshmoe {

/// The file of one rank: "trace.json" -> "trace.rank2.json" in a world of more than one.
[[nodiscard]] std::string trace_path(const std::string& path, int rank, int world_size);

/// Records torch operators and this library's phases (RECORD_FUNCTION) from its construction to
/// write(), through torch's profiler. One at a time in a process. Local.
class TraceSession {
 public:
  /// Starts recording. Throws InvalidArgument when `path` cannot be written, so that a long run
  /// does not find out at its end.
  explicit TraceSession(std::string path);
  /// Stops recording; writes nothing unless write() was called.
  ~TraceSession();
  TraceSession(const TraceSession&) = delete;
  TraceSession& operator=(const TraceSession&) = delete;

  /// Stops recording and writes the file, by a temporary in the system's folder for those
  /// (TMPDIR). Call it once. Throws Error when that fails.
  void write();

 private:
  std::string path_;
  bool recording_ = false;
};

/// While it lives, torch operators and this library's phases (RECORD_FUNCTION) are NVTX ranges too,
/// which NVIDIA's Nsight tools show beside the kernels. Not together with a TraceSession. Local.
class NvtxRanges {
 public:
  /// Throws NotConfigured where this build, or its torch, has no CUDA.
  NvtxRanges();
  ~NvtxRanges();
  NvtxRanges(const NvtxRanges&) = delete;
  NvtxRanges& operator=(const NvtxRanges&) = delete;
};

}  // namespace lshmoe
