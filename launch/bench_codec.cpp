#include "lshmoe/launch/bench_codec.hpp"

#include <torch/torch.h>

#include <algorithm>
#include <boost/program_options.hpp>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <iostream>
#include <string>
#include <vector>

#include "lshmoe/compress/codec.hpp"
#include "lshmoe/launch/npy.hpp"
#include "lshmoe/runtime/error.hpp"
#include "lshmoe/runtime/memory.hpp"

namespace lshmoe {
namespace {
namespace po = boost::program_options;

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

at::Tensor load_rows(const po::variables_map& given) {
  if (given.count("input") > 0) {
    Array array = read_npy(given["input"].as<std::string>());
    at::Tensor rows = at::from_blob(array.values.data(), {array.rows, array.columns}, at::kFloat);
    const auto first = given["first-row"].as<int64_t>();
    LSHMOE_VALIDATE(first >= 0 && first < array.rows, "--first-row ", first, " of ", array.rows,
                    " rows");
    return rows.slice(0, first).clone();
  }
  torch::manual_seed(0);
  return torch::randn({given["gaussian-rows"].as<int64_t>(), given["hidden-size"].as<int64_t>()});
}
}  // namespace

int bench_codec(int argc, char** argv) {
  CodecOptions codec;
  std::string dtype = "f32", direction = "dispatch";
  int64_t group_rows = 1024, repeat = 3;
  po::options_description options("lshmoe-bench codec: bits, errors and speed of a codec");
  auto add = options.add_options();
  add("help", "this text");
  add("input", po::value<std::string>(),
      "rows, a 2-D .npy of float16 or float32; default: Gaussian");
  add("first-row", po::value<int64_t>()->default_value(0), "first row of the file to use");
  add("gaussian-rows", po::value<int64_t>()->default_value(4096), "rows without --input");
  add("hidden-size", po::value<int64_t>()->default_value(384), "their length");
  add("group-rows", po::value(&group_rows)->default_value(1024), "rows of a group");
  add("kind", po::value(&codec.kind())->default_value("lsh"), "none | bf16 | lsh");
  add("restore", po::value(&codec.restore())->default_value("expert"), "expert | source");
  add("max-error", po::value(&codec.max_error())->default_value(0.1), "bound of every row");
  add("error-reference", po::value(&codec.error_reference())->default_value("row"), "row | group");
  add("hashes", po::value(&codec.hashes())->default_value(codec.hashes()), "hashes of a row");
  add("hash-dim", po::value(&codec.hash_dim())->default_value(codec.hash_dim()),
      "dimension of each");
  add("refine", po::value(&codec.refine())->default_value(codec.refine()),
      "nearest-centroid passes");
  add("max-clusters", po::value(&codec.max_clusters())->default_value(codec.max_clusters()),
      "clusters of a group at most; 0: none");
  add("dtype", po::value(&dtype)->default_value(dtype), "f32 | bf16");
  add("repeat", po::value(&repeat)->default_value(repeat), "timed repetitions; the best counts");
  po::variables_map given;
  try {
    po::store(po::parse_command_line(argc, argv, options), given);
    po::notify(given);
  } catch (const po::error& error) {
    throw InvalidArgument(std::string(error.what()) +
                          " (lshmoe-bench codec --help lists the options)");
  }
  if (given.count("help") > 0) {
    std::cout << options;
    return 0;
  }
  LSHMOE_VALIDATE(dtype == "f32" || dtype == "bf16", "unknown --dtype '", dtype,
                  "': use f32 or bf16");
  LSHMOE_VALIDATE(group_rows >= 1, "--group-rows ", group_rows, " must be 1 or more");
  LSHMOE_VALIDATE(repeat >= 1, "--repeat ", repeat, " must be 1 or more");
  tune_allocator();
  at::set_num_threads(1);

  CodecContext context;
  const at::Tensor x = load_rows(given).to(dtype == "f32" ? at::kFloat : at::kBFloat16);
  context.hidden_size = x.size(1);
  context.dtype = x.scalar_type();
  const auto made = make_codec(codec, context);
  std::vector<int64_t> groups;
  for (int64_t left = x.size(0); left > 0; left -= group_rows) {
    groups.push_back(std::min(left, group_rows));
  }

  Encoded encoded;
  double encode_seconds = INFINITY, decode_seconds = INFINITY;
  for (int64_t i = 0; i < repeat; ++i) {
    auto start = std::chrono::steady_clock::now();
    encoded = made->encode(x, groups);
    encode_seconds = std::min(encode_seconds, seconds_since(start));
    start = std::chrono::steady_clock::now();
    const Decoded decoded = made->decode(encoded.bytes, encoded.bytes_per_group);
    decode_seconds = std::min(decode_seconds, seconds_since(start));
  }
  const CodecStats& stats = encoded.stats;
  const double megabytes = static_cast<double>(stats.raw_bytes) * 1e-6;
  std::printf("rows %lld x %lld  groups %zu  bits/element %.3f  rate %.3f\n",
              static_cast<long long>(stats.rows), static_cast<long long>(context.hidden_size),
              groups.size(),
              8.0 * static_cast<double>(stats.sent_bytes) / static_cast<double>(x.numel()),
              static_cast<double>(stats.sent_bytes) / static_cast<double>(stats.raw_bytes));
  std::printf(
      "error mean %.4f max %.4f  of its bound at most %.4f  clusters %lld  whole rows %lld\n",
      stats.mean_relative_error, stats.max_relative_error, stats.max_error_ratio,
      static_cast<long long>(stats.clusters), static_cast<long long>(stats.whole_rows));
  std::printf("encode %.0f MB/s  decode %.0f MB/s  both %.0f MB/s (of bf16 rows, one thread)\n",
              megabytes / encode_seconds, megabytes / decode_seconds,
              megabytes / (encode_seconds + decode_seconds));
  return 0;
}

}  // namespace lshmoe
