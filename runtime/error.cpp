#include "lshmoe/runtime/error.hpp"

#include <atomic>

namespace lshmoe {
namespace {
std::atomic<int> g_process_rank{-1};

std::string with_rank(const std::string& message) {
  const int rank = process_rank();
  return rank < 0 ? message : "rank " + std::to_string(rank) + ": " + message;
}
}  // namespace

Error::Error(const std::string& message) : std::runtime_error(with_rank(message)) {}

void set_process_rank(int rank) { g_process_rank.store(rank, std::memory_order_relaxed); }
int process_rank() { return g_process_rank.load(std::memory_order_relaxed); }

namespace detail {
std::string counted(std::int64_t number, const std::string& thing) {
  return message(number, " ", thing, number == 1 ? "" : "s");
}

void fail_assert(const char* condition, const char* file, int line) {
  throw Error(message("internal check failed: ", condition, " at ", file, ":", line,
                      " (a bug in lshmoe): please report it with the command line"));
}
}  // namespace detail
}  // namespace lshmoe
