// lshmoe-bench: measurements. One subcommand a file.

#include <cstdio>
#include <exception>
#include <string_view>

#include "lshmoe/launch/bench_codec.hpp"
#include "lshmoe/launch/bench_layer.hpp"
#include "lshmoe/runtime/error.hpp"
#include "lshmoe/runtime/files.hpp"
#include "lshmoe/runtime/log.hpp"
#include "lshmoe/runtime/memory.hpp"
#include "lshmoe/runtime/signals.hpp"

int main(int argc, char** argv) {
  constexpr const char* kUsage =
      "usage: lshmoe-bench SUBCOMMAND [options]\n\n"
      "  codec   bits, errors and speed of a codec on rows of a file\n"
      "  layer   forward and backward of the MoE layer beside a plain one; alone or under "
      "mpirun\n\n"
      "lshmoe-bench SUBCOMMAND --help lists its options.\n";
  const std::string_view subcommand = argc > 1 ? argv[1] : "";
  lshmoe::tune_allocator();
  lshmoe::ignore_broken_pipes();
  try {
    if (subcommand == "codec") return lshmoe::launch::bench_codec(argc - 1, argv + 1);
    if (subcommand == "layer") return lshmoe::launch::bench_layer(argc - 1, argv + 1);
    if (subcommand == "--help" || subcommand == "-h") {
      std::fputs(kUsage, stdout);
      lshmoe::flush_stdout();
      return 0;
    }
  } catch (const std::exception& error) {
    lshmoe::log_error(error.what());
    return 1;
  }
  lshmoe::log_error(subcommand.empty()
                        ? "no subcommand: use lshmoe-bench codec or layer"
                        : lshmoe::detail::message("unknown subcommand '", subcommand,
                                                  "': use lshmoe-bench codec or layer"));
  std::fputs(kUsage, stderr);
  return 2;
}
