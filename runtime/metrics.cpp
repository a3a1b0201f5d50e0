#include "lshmoe/runtime/metrics.hpp"

#include <cerrno>
#include <nlohmann/json.hpp>

#include "lshmoe/runtime/error.hpp"
#include "lshmoe/runtime/files.hpp"

namespace lshmoe {

MetricsWriter::MetricsWriter(const std::string& path) : path_(path), file_(open_to_write(path)) {}

void MetricsWriter::write(const nlohmann::ordered_json& record) {
  // nlohmann's dump writes the shortest text that reads back as the same double, NaN as null.
  const std::string line = record.dump() + "\n";
  if (std::fwrite(line.data(), 1, line.size(), file_.get()) != line.size() ||
      std::fflush(file_.get()) != 0) {
    throw Error(not_written(path_, errno));
  }
}

}  // namespace lshmoe
