#pragma once
// lshmoe-bench codec: bits, errors and speed of one codec on rows from a file.

#include "lshmoe/runtime/error.hpp"

namespace lshmoe::launch {

/// Runs the subcommand; argv[0] is its name. Prints a table; throws Error.
void bench_codec(int argc, const char* const* argv);

}  // namespace lshmoe::launch
