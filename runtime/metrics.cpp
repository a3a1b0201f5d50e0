#include "lshmoe/runtime/metrics.hpp"

#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>

#include "lshmoe/runtime/error.hpp"

namespace lshmoe {

MetricsWriter::MetricsWriter(const std::string& path)
    : path_(path), file_(std::fopen(path.c_str(), "w")) {
  LSHMOE_VALIDATE(file_ != nullptr, "cannot write metrics to '", path, "' (", std::strerror(errno),
                  "): choose a path in a folder that exists and is writable");
}

void MetricsWriter::write(const nlohmann::ordered_json& record) {
  // nlohmann's dump writes the shortest text that reads back as the same double, NaN as null.
  const std::string line = record.dump() + "\n";
  if (std::fwrite(line.data(), 1, line.size(), file_.get()) != line.size() ||
      std::fflush(file_.get()) != 0) {
    throw Error(detail::message("writing metrics to '", path_, "' failed (", std::strerror(errno),
                                "): free some disk space"));
  }
}

}  // namespace lshmoe
