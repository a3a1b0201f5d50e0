#pragma once
// Errors: one small exception tree, and the checks that throw it.
//
// Every text reads: what is wrong (why) what to do. The rank is put in front when a Session runs.

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace lshmoe {

/// Base of every exception this library throws on purpose.
class Error : public std::runtime_error {
 public:
  /// `message` is prefixed with "rank R: " when a process rank is set.
  explicit Error(const std::string& message);
};

/// The caller passed something this library cannot work with, or bytes from a wire or file are
/// damaged.
class InvalidArgument : public Error {
 public:
  using Error::Error;
};

/// Communication failed, or the ranks disagree about what they are doing.
class CommError : public Error {
 public:
  using Error::Error;
};

/// A wait reached its deadline. The text names the peers waited for. The communicator is dead after
/// it.
class Timeout : public CommError {
 public:
  using CommError::CommError;
};

/// A CUDA call failed.
class CudaError : public Error {
 public:
  using Error::Error;
};

/// The build lacks the feature asked for. The text says how to configure it.
class NotConfigured : public Error {
 public:
  using Error::Error;
};

/// Rank put in front of error and log texts; -1 (the default) for none. Set by Session; local.
void set_process_rank(int rank);
/// The rank set last, or -1. Local.
[[nodiscard]] int process_rank();

namespace detail {
/// Streams all arguments into one string: message("hidden is ", 3).
template <class... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}
/// "1 rank", "2 ranks" of counted(n, "rank").
[[nodiscard]] std::string counted(std::int64_t number, const std::string& thing);
/// Throws Error with the place of a broken invariant.
[[noreturn]] void fail_assert(const char* condition, const char* file, int line);
}  // namespace detail

}  // namespace lshmoe

/// Throws InvalidArgument with the streamed parts when the condition does not hold:
/// LSHMOE_VALIDATE(k <= n, "top_k ", k, " > num_experts ", n, " (a token cannot ...): lower
/// top_k").
#define LSHMOE_VALIDATE(condition, ...)                                                        \
  do {                                                                                         \
    if (!(condition)) throw ::lshmoe::InvalidArgument(::lshmoe::detail::message(__VA_ARGS__)); \
  } while (false)

/// An invariant of this library's own; a failure is a bug here, not in the caller. Always on.
#define LSHMOE_ASSERT(condition)                                                     \
  do {                                                                               \
    if (!(condition)) ::lshmoe::detail::fail_assert(#condition, __FILE__, __LINE__); \
  } while (false)
