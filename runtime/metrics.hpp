#pragma once
// Metrics and measurements: one JSON object a line, for machines.

#include <cstdio>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>

#include "lshmoe/runtime/error.hpp"

namespace lshmoe {

/// Writes JSON lines to a file, each flushed when it is written, so that a killed job leaves whole
/// lines. Make it on rank 0 only.
class MetricsWriter {
 public:
  /// Opens `path` by open_to_write: throws InvalidArgument with the reason when that fails.
  explicit MetricsWriter(const std::string& path);

  /// Appends one object; numbers that are not finite become null (JSON has no NaN). Numbers keep
  /// all their bits: reading a double back gives the same double. Throws Error with the
  /// reason when that fails (the disk is full, a reader has gone).
  void write(const nlohmann::ordered_json& record);

 private:
  struct Close {
    void operator()(std::FILE* file) const { std::fclose(file); }
  };
  std::string path_;
  std::unique_ptr<std::FILE, Close> file_;
};

}  // namespace lshmoe
