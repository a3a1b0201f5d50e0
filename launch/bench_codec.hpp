#pragma once
// lshmoe-bench codec: bits, errors and speed of one codec on rows from a file.

namespace lshmoe {

/// Runs the subcommand; argv[0] is its name. Prints a table, returns the exit status, throws Error.
int bench_codec(int argc, char** argv);

}  // namespace lshmoe
