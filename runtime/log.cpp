#include "lshmoe/runtime/log.hpp"

#include <spdlog/pattern_formatter.h>
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>

#include <memory>

#include "lshmoe/runtime/error.hpp"

namespace lshmoe {
namespace {

/// %R: "[rank 3] ", the rank at the time of the line; nothing for a process alone.
class RankFlag : public spdlog::custom_flag_formatter {
 public:
  void format(const spdlog::details::log_msg&, const std::tm&, spdlog::memory_buf_t& out) override {
    const int rank = process_rank();
    if (rank < 0) return;
    const std::string text = "[rank " + std::to_string(rank) + "] ";
    out.append(text.data(), text.data() + text.size());
  }
  std::unique_ptr<custom_flag_formatter> clone() const override {
    return spdlog::details::make_unique<RankFlag>();
  }
};

spdlog::logger& logger() {
  static const std::shared_ptr<spdlog::logger> instance = [] {
    auto made = std::make_shared<spdlog::logger>("lshmoe",
                                                 std::make_shared<spdlog::sinks::stderr_sink_mt>());
    auto formatter = std::make_unique<spdlog::pattern_formatter>();
    formatter->add_flag<RankFlag>('R').set_pattern("[%H:%M:%S] %R[%l] %v");
    made->set_formatter(std::move(formatter));
    made->flush_on(spdlog::level::info);
    return made;
  }();
  return *instance;
}

// Error texts begin with the rank, and so does the line.
std::string without_rank(const std::string& text) {
  const std::string prefix = "rank " + std::to_string(process_rank()) + ": ";
  return text.starts_with(prefix) ? text.substr(prefix.size()) : text;
}

}  // namespace

void log_info(const std::string& text) {
  if (process_rank() <= 0) logger().info("{}", text);
}
void log_warn(const std::string& text) { logger().warn("{}", without_rank(text)); }
void log_error(const std::string& text) { logger().error("{}", without_rank(text)); }

}  // namespace lshmoe
