#pragma once
// lshmoe-bench codec: bits, errors and speed of one codec on rows from a file.

#include "lshmoe/runtime/error.hpp"

namespace lshmoe::launch {

/// Runs the subcommand, in one process alone; argv[0] is its name. Prints a table. Returns the exit
/// status; throws Error.
[[nodiscard]] int bench_codec(int argc, char** argv);

}  // namespace lshmoe::launch
