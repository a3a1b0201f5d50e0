#include "lshmoe/launch/bench_codec.hpp"

#include <torch/torch.h>

#include <algorithm>
#include <boost/program_options.hpp>
#include <chrono>
#include <cstdio>
#include <limits>
#include <string>
#include <vector>

#include "lshmoe/comm/self/self.hpp"
#include "lshmoe/compress/codec.hpp"
#include "lshmoe/launch/npy.hpp"
#include "lshmoe/runtime/error.hpp"
#include "lshmoe/runtime/options.hpp"

namespace lshmoe::launch {
namespace {
namespace po = boost::program_options;

struct BenchOptions {
  std::string input, dtype;
  int64_t first_row = 0, fit_rows = 0, gaussian_rows = 0, hidden_size = 0, group_rows = 0,
          repeat = 0;
};

at::Tensor load_rows(const BenchOptions& o) {
  if (o.input.empty()) {
    LSHMOE_VALIDATE(o.gaussian_rows >= 1 && o.hidden_size >= 1, "--gaussian-rows ", o.gaussian_rows,
                    " and --hidden-size ", o.hidden_size, " must be 1 or more");
    torch::manual_seed(0);
    return torch::randn({o.gaussian_rows, o.hidden_size});
  }
  const at::Tensor rows = read_npy(o.input);
  LSHMOE_VALIDATE(o.first_row >= 0 && o.first_row < rows.size(0), "--first-row ", o.first_row,
                  " is not one of the ", rows.size(0), " rows of '", o.input, "'");
  return rows.slice(0, o.first_row);
}

/// Runs `part` and returns its seconds.
template <class Part>
double time(Part part) {
  const auto start = std::chrono::steady_clock::now();
  part();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

}  // namespace

void bench_codec(int argc, const char* const* argv) {
  CodecOptions codec;
  BenchOptions o;
  OptionParser parser("lshmoe-bench codec",
                      "Bits, errors and speed of a codec on the rows of a file, one thread.");
  parser.group("Rows").add_options()("input", po::value(&o.input)->value_name("FILE.npy"),
                                     "a 2-D array of float16 or float32; default: Gaussian rows")(
      "first-row", po::value(&o.first_row)->default_value(0), "first row of the file to use")(
      "fit-rows", po::value(&o.fit_rows)->default_value(0),
      "state=learned: rows from --first-row on that the state is fitted to, and that are not "
      "measured")("gaussian-rows", po::value(&o.gaussian_rows)->default_value(4096),
                  "rows without --input")(
      "hidden-size", po::value(&o.hidden_size)->default_value(384), "their length")(
      "group-rows", po::value(&o.group_rows)->default_value(1024),
      "rows of a group: what one rank sends another")(
      "dtype", po::value(&o.dtype)->default_value("fp32"), "of the rows: fp32 or bf16")(
      "repeat", po::value(&o.repeat)->default_value(5), "timed repetitions; medians count");
  parser.group("Codec").add_options()("kind", po::value(&codec.kind())->default_value(codec.kind()),
                                      "none, bf16 or lsh")(
      "restore", po::value(&codec.restore())->default_value(codec.restore()), "expert or source")(
      "max-error", po::value(&codec.max_error())->default_value(codec.max_error(), "0.1"),
      "bound of every row")(
      "error-reference", po::value(&codec.error_reference())->default_value("row"), "row or group")(
      "hashes", po::value(&codec.hashes())->default_value(codec.hashes()), "hashes of a row")(
      "hash-dim", po::value(&codec.hash_dim())->default_value(codec.hash_dim()),
      "dimension of each")("refine", po::value(&codec.refine())->default_value(codec.refine()),
                           "nearest-centroid passes")(
      "state", po::value(&codec.state())->default_value(codec.state()), "batch or learned")(
      "codebook-size", po::value(&codec.codebook_size())->default_value(codec.codebook_size()),
      "learned: centroids at most")("transform",
                                    po::value(&codec.transform())->default_value(codec.transform()),
                                    "channels, or basis (learned)")(
      "max-clusters", po::value(&codec.max_clusters())->default_value(codec.max_clusters()),
      "clusters of a group at most; 0: none");
  if (!parser.parse(argc, argv)) return;
  LSHMOE_VALIDATE(o.dtype == "fp32" || o.dtype == "bf16", "unknown dtype '", o.dtype,
                  "': use --dtype fp32 or bf16");
  LSHMOE_VALIDATE(o.group_rows >= 1 && o.repeat >= 1, "--group-rows ", o.group_rows,
                  " and --repeat ", o.repeat, " must be 1 or more");
  at::set_num_threads(1);

  const at::Tensor all = load_rows(o).to(o.dtype == "fp32" ? at::kFloat : at::kBFloat16);
  LSHMOE_VALIDATE(o.fit_rows >= 0 && o.fit_rows < all.size(0) &&
                      (o.fit_rows > 0) == (codec.state() == "learned"),
                  "--fit-rows ", o.fit_rows, " of ", all.size(0), " rows with state ",
                  codec.state(),
                  " (a learned state is fitted to some rows and measured on the "
                  "rest): give both or none");
  CodecContext context;
  context.hidden_size = all.size(1);
  context.dtype = all.scalar_type();
  const auto made = make_codec(codec.sample_rows(o.fit_rows), context);
  made->observe(all.slice(0, 0, o.fit_rows), {});
  const auto alone = make_self_communicator();
  made->refresh(*alone);
  const at::Tensor x = all.slice(0, o.fit_rows);
  std::vector<int64_t> groups;
  for (int64_t left = x.size(0); left > 0; left -= o.group_rows) {
    groups.push_back(std::min(left, o.group_rows));
  }

  Encoded encoded;
  Decoded decoded;
  std::vector<double> encode_seconds, decode_seconds;
  for (int64_t i = -1; i < o.repeat; ++i) {  // the first one warms up
    const double encoding = time([&] { encoded = made->encode(x, groups); });
    const double decoding =
        time([&] { decoded = made->decode(encoded.bytes, encoded.bytes_per_group); });
    if (i < 0) continue;
    encode_seconds.push_back(encoding);
    decode_seconds.push_back(decoding);
  }

  const CodecStats& stats = encoded.stats;
  const auto bits = 8.0 * static_cast<double>(stats.sent_bytes) / static_cast<double>(x.numel());
  std::printf(
      "rows %lld x %lld %s, groups of %lld: %lld bytes, %.3f bits/element, %.1f %% of bf16\n",
      static_cast<long long>(stats.rows), static_cast<long long>(context.hidden_size),
      o.dtype.c_str(), static_cast<long long>(o.group_rows),
      static_cast<long long>(stats.sent_bytes), bits, 100.0 * bits / 16.0);
  // What came out, not what the encoder says: the errors of the decoded rows.
  if (decoded.rows.size(0) == x.size(0)) {
    const at::Tensor exact = x.to(at::kDouble);
    const at::Tensor error = at::linalg_vector_norm(decoded.rows.to(at::kDouble) - exact, 2, {1});
    const at::Tensor norm =
        at::linalg_vector_norm(exact, 2, {1}).clamp_min(std::numeric_limits<double>::min());
    const at::Tensor relative = error / norm;
    std::printf("relative error mean %.5f, max %.5f; largest share of a row's bound %.5f\n",
                relative.mean().item<double>(), relative.max().item<double>(),
                stats.max_error_ratio);
  } else {
    std::printf("relative error to the centroid mean %.5f, max %.5f (restore=source)\n",
                stats.mean_relative_error, stats.max_relative_error);
  }
  std::printf("clusters %lld (%.1f a group), whole rows %lld\n",
              static_cast<long long>(stats.clusters),
              static_cast<double>(stats.clusters) / static_cast<double>(groups.size()),
              static_cast<long long>(stats.whole_rows));
  const StateStats state = made->state_stats();
  if (state.version > 0) {
    std::printf("learned state %lld bytes, %lld centroids, fitted in %.2f s, %.1f MB in memory\n",
                static_cast<long long>(state.state_bytes), static_cast<long long>(state.centroids),
                state.seconds, 1e-6 * static_cast<double>(state.memory_bytes));
  }
  const double encoding = median(encode_seconds), decoding = median(decode_seconds);
  const double megabytes =
      static_cast<double>(x.numel()) * static_cast<double>(x.element_size()) * 1e-6;
  std::printf("encode %.0f MB/s, decode %.0f MB/s, both %.0f MB/s of %s rows\n",
              megabytes / encoding, megabytes / decoding, megabytes / (encoding + decoding),
              o.dtype.c_str());
}

}  // namespace lshmoe::launch
