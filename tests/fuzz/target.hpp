#pragma once
// What a fuzz target is: one function of bytes, and inputs to start from. Linked with libFuzzer
// (preset fuzz), or with corpus_main.cpp, which runs the corpus through the same function.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

namespace lshmoe::fuzz {

using Input = std::vector<std::uint8_t>;

/// Inputs that reach every part of the target. Deterministic.
[[nodiscard]] std::vector<Input> seeds();

/// Takes numbers from the front of an input; zeros behind its end.
class Reader {
 public:
  Reader(const std::uint8_t* data, std::size_t size) : at_(data), left_(size) {}
  template <class T>
  T take() {
    T value{};
    const std::size_t bytes = left_ < sizeof(T) ? left_ : sizeof(T);
    if (bytes > 0) std::memcpy(&value, at_, bytes);
    at_ += bytes;
    left_ -= bytes;
    return value;
  }
  [[nodiscard]] std::size_t left() const { return left_; }
  [[nodiscard]] Input rest() const { return {at_, at_ + left_}; }

 private:
  const std::uint8_t* at_;
  std::size_t left_;
};

/// A finding: ends the process, under libFuzzer and without it.
#define LSHMOE_FUZZ_CHECK(condition)                                                      \
  do {                                                                                    \
    if (!(condition)) {                                                                   \
      std::fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                       \
    }                                                                                     \
  } while (false)

}  // namespace lshmoe::fuzz

/// libFuzzer's entry. Exceptions that are not of this library are findings.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);
