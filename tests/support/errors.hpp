#pragma once
// What errors must say.

#include <gtest/gtest.h>

#include <string>

#include "lshmoe/runtime/error.hpp"

namespace lshmoe::testing {

/// Expects that `call` throws an E, and that `text` is part of what it says, in one line.
template <class E = InvalidArgument, class Call>
void expect_error(const std::string& text, Call call) {
  try {
    call();
    ADD_FAILURE() << "went on, instead of saying: " << text;
  } catch (const E& error) {
    const std::string said = error.what();
    EXPECT_NE(said.find(text), std::string::npos) << "'" << said << "' does not say: " << text;
    EXPECT_EQ(said.find('\n'), std::string::npos) << said;
  }
}

}  // namespace lshmoe::testing
