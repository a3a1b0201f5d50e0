#include "lshmoe/launch/bench_codec.hpp"

#include <torch/torch.h>

#include <algorithm>
#include <array>
#include <boost/program_options.hpp>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "lshmoe/comm/self/self.hpp"
#include "lshmoe/comm/session.hpp"
#include "lshmoe/compress/codec.hpp"
#include "lshmoe/compress/cuda/stream_phases.hpp"
#include "lshmoe/compress/phases.hpp"
#include "lshmoe/kernels/cuda/grid.hpp"
#include "lshmoe/kernels/reference_norm.hpp"
#include "lshmoe/launch/bench_formats.hpp"
#include "lshmoe/launch/bench_timing.hpp"
#include "lshmoe/launch/npy.hpp"
#include "lshmoe/launch/plot.hpp"
#include "lshmoe/runtime/error.hpp"
#include "lshmoe/runtime/files.hpp"
#include "lshmoe/runtime/log.hpp"
#include "lshmoe/runtime/metrics.hpp"
#include "lshmoe/runtime/options.hpp"

namespace lshmoe::launch {
namespace {
namespace po = boost::program_options;
using detail::counted;
using std::string;

constexpr const char* kSynthetic = "synthetic";
constexpr double kBf16Bits = 16;
// Of a row from its center, whose norm is about 1 in the same unit.
constexpr double kClusterRadius = 0.3;

struct BenchOptions {
  string input, dtype, json, plot;
  int64_t first_row = 0, fit_rows = 0, synthetic_rows = 0, synthetic_clusters = 0, hidden_size = 0,
          group_rows = 0, repeat = 0;
  bool phases = false;
  string device;
  int num_sms = 0;
  // Every combination that makes sense is one row of the table.
  std::vector<string> kinds, states, restores, references, roundings, transforms;
  std::vector<double> max_errors, rates;
  std::vector<int64_t> codebook_sizes, max_clusters, refines;
  int64_t hashes = 0, hash_dim = 0;
};

/// One row of the table. Settings that its kind does not have stay empty.
struct Case {
  string kind;
  CodecOptions codec;  // of a library's kind
  std::optional<string> state, restore, reference, rounding, transform;
  std::optional<double> max_error, rate;
  std::optional<int64_t> codebook_size, max_clusters, refine;

  [[nodiscard]] bool is_library() const {
    const auto& others = bench_format_names();
    return std::find(others.begin(), others.end(), kind) == others.end();
  }
  /// What sets it apart from the others of the table, but for its error bound or rate.
  [[nodiscard]] string name() const {
    string text = kind;
    for (const auto& part : {restore == "source" ? restore : std::nullopt, state, transform}) {
      if (part) text += " " + *part;
    }
    if (codebook_size) text += " K" + std::to_string(*codebook_size);
    if (max_clusters) text += " C" + std::to_string(*max_clusters);
    if (refine && *refine != CodecOptions().refine()) text += " refine " + std::to_string(*refine);
    if (reference == "group") text += " group";
    if (rounding.value_or("nearest") != "nearest") text += " " + *rounding;
    return text;
  }
};

/// Medians, phase by phase; those that took no time left out.
using Phases = std::vector<std::pair<Phase, PhaseCost>>;

/// Medians of a GPU's stream, phase by phase, in seconds.
using StreamCosts = std::vector<std::pair<string, double>>;

struct Result {
  int64_t bytes = 0, clusters = 0, state_bytes = 0, staged_bytes = 0;
  double mean_error = 0, p99_error = 0, max_error_seen = 0;
  // Of all rows; not known for what only makes a round trip.
  std::optional<double> encode_seconds, decode_seconds;
  Phases encode_phases, decode_phases;       // with --phases, on the CPU
  StreamCosts encode_stream, decode_stream;  // with --phases, on a GPU
  // With --phases: BLAS alone, for the products with a basis there and back.
  double gemm_seconds = 0;
};

/// The rows measured and those a state is fitted to.
struct Rows {
  at::Tensor fit, x;
  std::vector<int64_t> groups;
};

at::Tensor load_rows(const BenchOptions& o) {
  if (o.input == kSynthetic) {
    at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(0);
    const at::Tensor noise = at::randn({o.synthetic_rows, o.hidden_size}, generator);
    if (o.synthetic_clusters == 0) return noise;
    const at::Tensor centers = at::randn({o.synthetic_clusters, o.hidden_size}, generator);
    const at::Tensor id =
        at::randint(o.synthetic_clusters, {o.synthetic_rows}, generator, at::kLong);
    return centers.index_select(0, id).add_(noise, kClusterRadius);
  }
  const at::Tensor rows = read_npy(o.input);
  LSHMOE_VALIDATE(o.first_row < rows.size(0), "--first-row ", o.first_row, " is beyond '", o.input,
                  "' (it has ", counted(rows.size(0), "row"), ", from 0): give a smaller one");
  return rows.slice(0, o.first_row);
}

Rows split_rows(const BenchOptions& o) {
  at::Tensor all = load_rows(o);
  if (o.dtype == "fp32" || (o.dtype == "as input" && all.scalar_type() == at::kHalf)) {
    all = all.to(at::kFloat);
  } else if (o.dtype == "bf16") {
    all = all.to(at::kBFloat16);
  }
  LSHMOE_VALIDATE(o.fit_rows < all.size(0), "--fit-rows ", o.fit_rows, " of ",
                  counted(all.size(0), "row"),
                  " leaves none to measure (what is measured is the rest): give fewer");
  all = all.to(at::Device(o.device));
  Rows rows{all.slice(0, 0, o.fit_rows), all.slice(0, o.fit_rows), {}};
  for (int64_t left = rows.x.size(0); left > 0; left -= o.group_rows) {
    rows.groups.push_back(std::min(left, o.group_rows));
  }
  return rows;
}

/// Those of --rounding that a kind has.
std::vector<string> roundings_of(const string& kind, const BenchOptions& o) {
  std::vector<string> own{"nearest"};
  if (kind == "lsh") own.push_back("dithered");
  if (kind == "fp8" || kind == "int8" || kind == "int4") own.push_back("stochastic");
  std::vector<string> asked;
  for (const string& rounding : o.roundings) {
    if (std::find(own.begin(), own.end(), rounding) != own.end()) asked.push_back(rounding);
  }
  return asked;
}

/// kind lsh with these settings, as far as they apply; none for those that exclude each other.
std::optional<Case> lsh_case(const BenchOptions& o, const string& restore, const string& state,
                             const string& transform) {
  Case c;
  c.kind = "lsh";
  c.restore = restore;
  c.codec.kind("lsh").restore(restore).sample_rows(o.fit_rows);
  c.codec.hashes(o.hashes).hash_dim(o.hash_dim);
  c.codec.projection(std::max(c.codec.projection(), o.hashes * o.hash_dim));
  if (restore == "source") return c;
  if (transform == "basis" && state == "batch") return std::nullopt;  // no parcel carries a basis
  c.state = state;
  c.transform = transform;
  c.codec.state(state).transform(transform).force_basis(true);
  return c;
}

std::vector<Case> lsh_cases(const BenchOptions& o) {
  std::vector<Case> cases;
  const auto add = [&](const Case& c) {
    const auto same = [&](const Case& other) {
      return other.name() == c.name() && other.max_error == c.max_error;
    };
    if (std::none_of(cases.begin(), cases.end(), same)) cases.push_back(c);
  };
  // The settings of one pair of ends, then the bounds.
  const auto add_bounds = [&](Case c) {
    if (c.restore == "source") return add(c);
    for (const string& reference : o.references) {
      for (const string& rounding : roundings_of(c.kind, o)) {
        for (const double max_error : o.max_errors) {
          c.reference = reference;
          c.rounding = rounding;
          c.max_error = max_error;
          c.codec.error_reference(reference).rounding(rounding).max_error(max_error);
          add(c);
        }
      }
    }
  };
  for (const string& restore : o.restores) {
    for (const string& state : o.states) {
      for (const string& transform : o.transforms) {
        std::optional<Case> c = lsh_case(o, restore, state, transform);
        if (!c) continue;
        if (c->state == "learned") {
          for (const int64_t size : o.codebook_sizes) {
            c->codebook_size = size;
            c->codec.codebook_size(size);
            add_bounds(*c);
          }
          continue;
        }
        for (const int64_t refine : o.refines) {
          for (const int64_t clusters : o.max_clusters) {
            // Nothing to refine without clusters.
            c->refine = clusters > 0 || restore == "source" ? std::optional(refine) : std::nullopt;
            // restore=source without refinement sends every bucket.
            if (restore == "expert" || refine > 0) c->max_clusters = clusters;
            c->codec.refine(refine).max_clusters(clusters);
            add_bounds(*c);
          }
        }
      }
    }
  }
  return cases;
}

std::vector<Case> make_cases(const BenchOptions& o) {
  std::vector<Case> cases;
  for (const string& kind : o.kinds) {
    if (kind == "lsh") {
      const std::vector<Case> more = lsh_cases(o);
      cases.insert(cases.end(), more.begin(), more.end());
      continue;
    }
    Case c;
    c.kind = kind;
    if (c.is_library()) c.codec.kind(kind);
    if (kind == "fp8" || kind == "int8" || kind == "int4") {
      for (const string& rounding : roundings_of(kind, o)) {
        c.rounding = rounding;
        c.codec.rounding(rounding);
        cases.push_back(c);
      }
      continue;
    }
    for (const double rate : o.rates) {
      if (has_rate(kind)) c.rate = rate;
      cases.push_back(c);
      if (!has_rate(kind)) break;
    }
  }
  for (const Case& c : cases) {
    if (c.is_library()) validate(c.codec);
    LSHMOE_VALIDATE(c.state != "learned" || o.fit_rows > 0,
                    "state learned needs --fit-rows (it is fitted to the first rows and measured "
                    "on the rest)");
  }
  LSHMOE_VALIDATE(!cases.empty(),
                  "no combination of these options makes sense (transform basis "
                  "needs --state learned; rounding dithered is lsh's): give others");
  return cases;
}

/// Runs `part` and returns the seconds that this thread computed (codecs use no other), whatever
/// else the machine does. On a GPU: stream_time.
template <class Part>
double time(Part part, at::Device device = at::kCPU) {
  if (!device.is_cpu()) return stream_time(part, device);
  const double start = thread_seconds();
  part();
  return thread_seconds() - start;
}

/// Errors of the rows received: the largest relative to what bounds it (reference row or group;
/// empty: the row's norm), the others to each row's norm, or with group to the same.
void set_errors(Result& result, const Rows& rows, const at::Tensor& received,
                const string& reference) {
  const at::Tensor exact = rows.x.cpu().to(at::kDouble);
  const at::Tensor error = at::linalg_vector_norm(received.cpu().to(at::kDouble) - exact, 2, {1});
  const at::Tensor norm = at::linalg_vector_norm(exact, 2, {1}).contiguous();
  at::Tensor bounding = norm;
  if (!reference.empty()) {
    const at::Tensor squared = norm.square();
    const double cap =
        kernels::norm_cap(squared.const_data_ptr<double>(), nullptr, squared.numel());
    bounding = norm.clamp_max(cap);
    if (reference == "group") {
      const auto* from = norm.const_data_ptr<double>();
      std::vector<at::Tensor> groups;
      for (const int64_t count : rows.groups) {
        groups.push_back(
            at::full({count}, kernels::group_reference(from, count, cap), at::kDouble));
        from += count;
      }
      bounding = at::cat(groups);
    }
  }
  const auto relative = [&error](const at::Tensor& to) {
    return std::get<0>((error / to.clamp_min(std::numeric_limits<double>::min())).sort());
  };
  result.max_error_seen = relative(bounding)[-1].item<double>();
  const at::Tensor all = relative(reference == "group" ? bounding : norm);
  result.mean_error = all.mean().item<double>();
  const auto last = static_cast<double>(all.size(0) - 1);
  result.p99_error = all[std::llround(0.99 * last)].item<double>();
}

/// Runs `part` `repeat` times, timed by phases.
template <class Part>
Phases measure_phases(int64_t repeat, Part part) {
  std::array<std::vector<double>, kPhases> seconds, wall;
  std::array<PhaseCost, kPhases> costs;
  for (int64_t i = 0; i < repeat; ++i) {
    PhaseRecorder recorder;
    part();
    costs = recorder.costs();
    for (std::size_t p = 0; p < kPhases; ++p) {
      seconds[p].push_back(costs[p].seconds);
      wall[p].push_back(costs[p].wall_seconds);
    }
  }
  Phases phases;
  for (std::size_t p = 0; p < kPhases; ++p) {
    const double typical = median(seconds[p]);
    if (typical > 0) {
      phases.push_back(
          {static_cast<Phase>(p), {typical, median(wall[p]), costs[p].bytes, costs[p].flops}});
    }
  }
  return phases;
}

/// The same on a GPU's stream.
template <class Part>
StreamCosts measure_stream(int64_t repeat, at::Device device, Part part) {
  StreamCosts costs;
  std::vector<std::vector<double>> seconds;
  for (int64_t i = 0; i < repeat; ++i) {
    cuda::StreamPhases phases(device);
    part();
    costs = phases.seconds();
    seconds.resize(costs.size());
    for (std::size_t p = 0; p < costs.size(); ++p) seconds[p].push_back(costs[p].second);
  }
  for (std::size_t p = 0; p < costs.size(); ++p) costs[p].second = median(seconds[p]);
  return costs;
}

/// Seconds that torch's BLAS takes for rows times a square matrix, group by group, there and back.
double time_products(const Rows& rows, int64_t repeat) {
  const int64_t hidden = rows.x.size(1);
  const at::Tensor square = at::randn({hidden, hidden});
  std::vector<std::pair<at::Tensor, at::Tensor>> groups;
  for (const at::Tensor& group : rows.x.to(at::kFloat).split_with_sizes(rows.groups)) {
    groups.emplace_back(group, at::zeros_like(group));
  }
  std::vector<double> seconds;
  for (int64_t i = 0; i < repeat; ++i) {
    seconds.push_back(time([&] {
      for (auto& [group, out] : groups) {
        at::mm_out(out, group, square);
        at::mm_out(out, group, square);
      }
    }));
  }
  return median(seconds);
}

Result measure_codec(const Case& c, const Rows& rows, int64_t repeat, bool phases) {
  CodecContext context;
  context.hidden_size = rows.x.size(1);
  context.dtype = rows.x.scalar_type();
  context.device = rows.x.device();
  const auto codec = make_codec(c.codec, context);
  codec->observe(rows.fit, {});
  codec->refresh(*make_self_communicator());
  Encoded encoded;
  Decoded decoded;
  std::vector<double> encode_seconds, decode_seconds;
  for (int64_t i = -1; i < repeat; ++i) {  // the first one warms up
    const double encoding =
        time([&] { encoded = codec->encode(rows.x, rows.groups); }, context.device);
    const double decoding = time(
        [&] { decoded = codec->decode(encoded.bytes, encoded.bytes_per_group); }, context.device);
    if (i < 0) continue;
    encode_seconds.push_back(encoding);
    decode_seconds.push_back(decoding);
  }
  Result result;
  result.bytes = encoded.bytes.numel();
  result.clusters = encoded.stats.clusters;
  result.state_bytes = codec->state_stats().state_bytes;
  result.staged_bytes = encoded.stats.staged_bytes;
  result.encode_seconds = median(encode_seconds);
  result.decode_seconds = median(decode_seconds);
  if (phases && !context.device.is_cpu()) {
    result.encode_stream = measure_stream(repeat, context.device,
                                          [&] { encoded = codec->encode(rows.x, rows.groups); });
    result.decode_stream = measure_stream(repeat, context.device, [&] {
      decoded = codec->decode(encoded.bytes, encoded.bytes_per_group);
    });
  } else if (phases) {
    result.encode_phases =
        measure_phases(repeat, [&] { encoded = codec->encode(rows.x, rows.groups); });
    result.decode_phases = measure_phases(
        repeat, [&] { decoded = codec->decode(encoded.bytes, encoded.bytes_per_group); });
    result.gemm_seconds = time_products(rows, repeat);
  }
  // restore=source: what arrives are centroids, and a row is taken for its own.
  const at::Tensor received =
      c.restore == "source" ? decoded.rows.index_select(0, encoded.assignment) : decoded.rows;
  set_errors(result, rows, received, c.reference.value_or(""));
  return result;
}

Result measure_format(const Case& c, const Rows& rows) {
  Result result;
  std::vector<at::Tensor> received;
  for (const at::Tensor& group : rows.x.cpu().split_with_sizes(rows.groups)) {
    const RoundTrip trip = round_trip(c.kind, group, c.rate.value_or(0));
    received.push_back(trip.rows);
    result.bytes += trip.bytes + static_cast<int64_t>(ParcelHeader::kBytes);
    result.clusters += trip.clusters;
  }
  set_errors(result, rows, at::cat(received), "");
  return result;
}

double bits_of(const Result& result, const Rows& rows) {
  return 8.0 * static_cast<double>(result.bytes) / static_cast<double>(rows.x.numel());
}
std::optional<double> seconds_of(const Result& result) {
  if (!result.encode_seconds) return std::nullopt;
  return *result.encode_seconds + *result.decode_seconds;
}

/// Bandwidth of a link in Gbit/s below which sending the saved bits takes longer than coding. 0:
/// nothing is saved; nothing: it takes no time more, or the time is not known.
std::optional<double> break_even(const Rows& rows, double bits_saved,
                                 std::optional<double> seconds) {
  if (!seconds) return std::nullopt;
  if (bits_saved <= 0) return 0.0;
  if (*seconds <= 0) return std::nullopt;
  return 1e-9 * bits_saved * static_cast<double>(rows.x.numel()) / *seconds;
}

template <class T>
nlohmann::ordered_json or_null(const std::optional<T>& value) {
  return value ? nlohmann::ordered_json(*value) : nlohmann::ordered_json(nullptr);
}

struct Line {
  nlohmann::ordered_json json;
  PlotPoint point;
};

Line report(const Case& c, const Result& result, const Rows& rows, const Result& fp8,
            double bandwidth) {
  const double bits = bits_of(result, rows);
  const double megabytes = 1e-6 * static_cast<double>(rows.x.nbytes());
  const auto speed = [&](const std::optional<double>& seconds) {
    return seconds ? std::optional(megabytes / *seconds) : std::nullopt;
  };
  const auto seconds = seconds_of(result);
  const auto even_bf16 = break_even(rows, kBf16Bits - bits, seconds);
  const auto even_fp8 =
      break_even(rows, bits_of(fp8, rows) - bits,
                 seconds ? std::optional(*seconds - *seconds_of(fp8)) : std::nullopt);
  Line line;
  line.point = {bits, result.mean_error};
  nlohmann::ordered_json& json = line.json;
  json["kind"] = c.kind;
  json["state"] = or_null(c.state);
  json["restore"] = or_null(c.restore);
  json["max_error"] = or_null(c.max_error);
  json["rows"] = rows.x.size(0);
  json["hidden"] = rows.x.size(1);
  json["bits_per_element"] = bits;
  json["mean_error"] = result.mean_error;
  json["p99_error"] = result.p99_error;
  json["max_error_seen"] = result.max_error_seen;
  json["encode_mb_s"] = or_null(speed(result.encode_seconds));
  json["decode_mb_s"] = or_null(speed(result.decode_seconds));
  json["error_reference"] = or_null(c.reference);
  json["rounding"] = or_null(c.rounding);
  json["break_even_gbit_s_bf16"] = or_null(even_bf16);
  json["break_even_gbit_s_fp8"] = or_null(even_fp8);
  json["transform"] = or_null(c.transform);
  json["codebook_size"] = or_null(c.codebook_size);
  json["state_bytes"] = result.state_bytes;
  // Rows after which the state is a hundredth of the bytes.
  json["rows_to_amortise_1pct"] =
      std::ceil(100.0 * static_cast<double>(result.state_bytes) /
                (static_cast<double>(result.bytes) / static_cast<double>(rows.x.size(0))));
  json["clusters"] = result.clusters;
  if (!rows.x.is_cpu() && result.encode_seconds) {
    // Rows read and bytes written, once each, and the other way round, beside a copy's.
    const double moved = static_cast<double>(rows.x.nbytes()) + static_cast<double>(result.bytes);
    json["device"] = rows.x.device().str();
    json["staged_bytes"] = result.staged_bytes;
    json["encode_of_copy"] = moved / *result.encode_seconds / bandwidth;
    json["decode_of_copy"] = moved / *result.decode_seconds / bandwidth;
  }

  const auto number = [](const std::optional<double>& value, const char* format) {
    char text[32] = "-";
    if (value) std::snprintf(text, sizeof text, format, *value);
    return string(text);
  };
  const auto fp8_text = seconds && !even_fp8 ? string("any") : number(even_fp8, "%.1f");
  std::printf("%-34s %6s %8.3f %8.4f %8.4f %8.4f %8s %8s %8s %8s %8lld %9lld\n", c.name().c_str(),
              number(c.rate ? c.rate : c.max_error, "%g").c_str(), bits, result.mean_error,
              result.p99_error, result.max_error_seen,
              number(speed(result.encode_seconds), "%.0f").c_str(),
              number(speed(result.decode_seconds), "%.0f").c_str(),
              number(even_bf16, "%.1f").c_str(), fp8_text.c_str(),
              static_cast<long long>(result.clusters), static_cast<long long>(result.state_bytes));
  if (json.contains("encode_of_copy")) {
    std::printf("  of the copy bandwidth: encode %.1f%%, decode %.1f%%; %s went through the host\n",
                100 * json["encode_of_copy"].get<double>(),
                100 * json["decode_of_copy"].get<double>(),
                counted(result.staged_bytes, "byte").c_str());
  }
  flush_stdout();
  return line;
}

/// Bytes a second that a copy reads and writes, beyond the caches.
double copy_bandwidth(at::Device device) {
  if (!device.is_cpu()) {
    const at::Tensor from = at::zeros({int64_t{1} << 29}, at::dtype(at::kByte).device(device));
    at::Tensor to = at::empty_like(from);
    std::vector<double> seconds;
    for (int i = 0; i < 9; ++i) seconds.push_back(time([&] { to.copy_(from); }, device));
    return 2 * static_cast<double>(from.nbytes()) / median(seconds);
  }
  std::vector<char> from(std::size_t{64} << 20, 1), to(from.size());
  std::vector<double> seconds;
  for (int i = 0; i < 9; ++i) {
    from[0] = to[to.size() / 2];
    seconds.push_back(time([&] { std::memcpy(to.data(), from.data(), from.size()); }));
  }
  return 2 * static_cast<double>(from.size()) / median(seconds);
}

/// A table below the codec's row, and the same for machines.
nlohmann::ordered_json report_phases(const Result& result, const Rows& rows, double bandwidth,
                                     bool with_basis) {
  nlohmann::ordered_json json;
  const double raw = static_cast<double>(rows.x.nbytes());
  json["copy_gb_s"] = 1e-9 * bandwidth;
  const double flops =
      4 * static_cast<double>(rows.x.numel()) * static_cast<double>(rows.x.size(1));
  const double gemm = flops / result.gemm_seconds;
  json["gemm_gflop_s"] = 1e-9 * gemm;
  std::printf("    torch's BLAS multiplies with %.0f GFLOP/s\n", 1e-9 * gemm);
  std::printf("    %-7s %-12s %9s %9s %6s %9s %9s %8s\n", "", "phase", "ms", "wall ms", "share",
              "MB/s", "", "of copy");
  double wall = 0;
  const auto table = [&](const char* name, const Phases& phases) {
    double sum = 0;
    for (const auto& [phase, cost] : phases) sum += cost.seconds;
    for (const auto& [phase, cost] : phases) {
      wall += cost.wall_seconds;
      nlohmann::ordered_json& one = json[name][string(name_of(phase))];
      one["ms"] = 1e3 * cost.seconds;
      one["wall_ms"] = 1e3 * cost.wall_seconds;
      one["mb_s"] = 1e-6 * raw / cost.seconds;
      std::printf("    %-7s %-12s %9.3f %9.3f %5.1f%% %9.0f", name, string(name_of(phase)).c_str(),
                  1e3 * cost.seconds, 1e3 * cost.wall_seconds, 100 * cost.seconds / sum,
                  1e-6 * raw / cost.seconds);
      // Products are held against BLAS, what only reads and writes against a copy.
      if (cost.flops > 0) {
        const double rate = static_cast<double>(cost.flops) / cost.seconds;
        one["flops"] = cost.flops;
        one["of_gemm"] = rate / gemm;
        std::printf(" %4.0f GF/s %7.0f%% of BLAS", 1e-9 * rate, 100 * rate / gemm);
      } else if (cost.bytes > 0) {
        const double moved = static_cast<double>(cost.bytes) / cost.seconds;
        one["bytes"] = cost.bytes;
        one["of_copy"] = moved / bandwidth;
        std::printf(" %4.1f GB/s %7.0f%%", 1e-9 * moved, 100 * moved / bandwidth);
      }
      std::printf("\n");
    }
  };
  table("encode", result.encode_phases);
  table("decode", result.decode_phases);
  const double both = *seconds_of(result);
  json["mb_s"] = 1e-6 * raw / both;
  std::printf(
      "    encode + decode %.3f ms, %.0f MB/s; with the clocks of the phases %.3f ms of wall "
      "time\n",
      1e3 * both, 1e-6 * raw / both, 1e3 * wall);
  if (with_basis) {
    json["gemm_of_all"] = result.gemm_seconds / both;
    std::printf("    the basis' two products alone, by BLAS: %.3f ms, %.0f%% of encode + decode\n",
                1e3 * result.gemm_seconds, 100 * result.gemm_seconds / both);
  }
  return json;
}

/// The same of a GPU's stream.
nlohmann::ordered_json report_stream(const Result& result, const Rows& rows) {
  nlohmann::ordered_json json;
  const double raw = static_cast<double>(rows.x.nbytes());
  std::printf("    %-7s %-20s %9s %6s %9s\n", "", "phase", "ms", "share", "GB/s");
  const auto table = [&](const char* name, const StreamCosts& costs) {
    double sum = 0;
    for (const auto& one : costs) sum += one.second;
    for (const auto& [phase, seconds] : costs) {
      json[name][phase]["ms"] = 1e3 * seconds;
      std::printf("    %-7s %-20s %9.3f %5.1f%% %9.1f\n", name, phase.c_str(), 1e3 * seconds,
                  sum > 0 ? 100 * seconds / sum : 0, seconds > 0 ? 1e-9 * raw / seconds : 0);
    }
  };
  table("encode", result.encode_stream);
  table("decode", result.decode_stream);
  return json;
}

template <class T>
po::typed_value<std::vector<T>>* list(std::vector<T>& variable, const std::vector<T>& defaults,
                                      const string& text) {
  return po::value(&variable)->default_value(defaults, text)->multitoken()->composing();
}

void add_options(OptionParser& parser, BenchOptions& o) {
  parser.group("Rows").add_options()(
      "input", po::value(&o.input)->value_name("FILE.npy")->default_value(kSynthetic),
      "a 2-D array of float16, float32 or bfloat16; or synthetic: Gaussian rows, always the same")(
      "first-row", po::value(&o.first_row)->default_value(0), "first row of the file to use")(
      "fit-rows", po::value(&o.fit_rows)->default_value(0),
      "rows from --first-row on that a learned state is fitted to; the rest is measured")(
      "synthetic-rows", po::value(&o.synthetic_rows)->default_value(4096), "rows of synthetic")(
      "hidden-size", po::value(&o.hidden_size)->default_value(384), "their length")(
      "synthetic-clusters", po::value(&o.synthetic_clusters)->default_value(0),
      "synthetic: rows near that many centers, at 0.3 of their norm; 0: no centers")(
      "group-rows", po::value(&o.group_rows)->default_value(1024),
      "rows of a group: what one rank sends another")(
      "dtype", po::value(&o.dtype)->default_value("as input"),
      "what the rows become: fp32 or bf16; float16 becomes fp32 by itself")(
      "repeat", po::value(&o.repeat)->default_value(5), "timed repetitions; medians count");
  parser.group("Codecs (every list is repeatable; each combination that makes sense is measured)")
      .add_options()(
          "kind",
          list<string>(o.kinds, {"bf16", "fp8", "int8", "int4", "lsh"}, "bf16 fp8 int8 int4 lsh"),
          "none, bf16, fp8, int8, int4, lsh; to compare with: mxfp4, nvfp4, rcmoe8, "
          "rcmoe4, drop, kmeans; or all")("state", list<string>(o.states, {"batch"}, "batch"),
                                          "lsh: batch or learned")(
          "restore", list<string>(o.restores, {"expert"}, "expert"), "lsh: expert or source")(
          "max-error", list<double>(o.max_errors, {0.1}, "0.1"), "lsh: bound of every row")(
          "error-reference", list<string>(o.references, {"row"}, "row"), "lsh: row or group")(
          "rounding", list<string>(o.roundings, {"nearest"}, "nearest"),
          "nearest; lsh: or dithered; fp8, int8, int4: or stochastic")(
          "transform", list<string>(o.transforms, {"channels"}, "channels"),
          "lsh: channels, or basis (learned)")("codebook-size",
                                               list<int64_t>(o.codebook_sizes, {1024}, "1024"),
                                               "lsh, learned: centroids at most")(
          "max-clusters", list<int64_t>(o.max_clusters, {128}, "128"),
          "lsh, batch and source: clusters of a group at most; 0: none")(
          "refine", list<int64_t>(o.refines, {1}, "1"),
          "lsh, batch and source: nearest-centroid passes; 0: LSH buckets as they are (the paper)")(
          "hashes", po::value(&o.hashes)->default_value(3), "lsh: hashes of a row")(
          "hash-dim", po::value(&o.hash_dim)->default_value(8), "lsh: dimension of each")(
          "rate", list<double>(o.rates, {0.2}, "0.2"),
          "drop, kmeans: share of the rows, or centroids a row");
  parser.group("Device").add_options()("device", po::value(&o.device)->default_value("cpu"),
                                       "cpu or cuda: where the rows are")(
      "num-sms", po::value(&o.num_sms)->default_value(0),
      "cuda: multiprocessors that the codec's kernels may fill (8 blocks each); 0: all");
  parser.group("Output").add_options()("json", po::value(&o.json)->value_name("FILE"),
                                       "one object a line for each row of the table; - or "
                                       "/dev/stdout: the table goes to standard error")(
      "plot", po::value(&o.plot)->value_name("FILE.svg"),
      "a picture: bits per element against mean relative error")(
      "phases", po::bool_switch(&o.phases),
      "where the time goes, phase by phase; on the CPU beside memcpy and BLAS");
}

void check(BenchOptions& o) {
  LSHMOE_VALIDATE(o.dtype == "as input" || o.dtype == "fp32" || o.dtype == "bf16",
                  "unknown dtype '", o.dtype, "': use --dtype fp32 or bf16");
  check_at_least("first-row", o.first_row, 0);
  check_at_least("fit-rows", o.fit_rows, 0);
  check_at_least("synthetic-rows", o.synthetic_rows, 1);
  check_at_least("hidden-size", o.hidden_size, 1);
  check_at_least("synthetic-clusters", o.synthetic_clusters, 0);
  check_at_least("group-rows", o.group_rows, 1);
  check_at_least("repeat", o.repeat, 1);
  for (const int64_t size : o.codebook_sizes) check_at_least("codebook-size", size, 0);
  LSHMOE_VALIDATE(o.plot.empty() || o.plot.ends_with(".svg"), "--plot '", o.plot,
                  "' does not end in .svg (no other picture is written): name it so");
  for (const string& rounding : o.roundings) {
    LSHMOE_VALIDATE(rounding == "nearest" || rounding == "dithered" || rounding == "stochastic",
                    "unknown rounding '", rounding,
                    "': use --rounding nearest, dithered or stochastic");
  }
  for (const double rate : o.rates) {
    LSHMOE_VALIDATE(rate > 0 && rate <= 1, "--rate ", rate, " must be above 0 and at most 1");
  }
  LSHMOE_VALIDATE(o.device == "cpu" || o.device == "cuda", "unknown device '", o.device,
                  "': use --device cpu or cuda");
  LSHMOE_VALIDATE(o.device == "cpu" || at::getNumGPUs() > 0,
                  "--device cuda, but no GPU was found: use --device cpu");
  LSHMOE_VALIDATE(o.num_sms >= 0 && (o.num_sms == 0 || o.device == "cuda"), "--num-sms ", o.num_sms,
                  " is for --device cuda: give 1 or more there, or leave it out");
  if (o.num_sms > 0) kernels::cuda::set_grid_limit(8 * o.num_sms);
  const std::vector<string> own{"none", "bf16", "fp8", "int8", "int4", "lsh"};
  const std::vector<string>& others = bench_format_names();
  if (std::find(o.kinds.begin(), o.kinds.end(), "all") != o.kinds.end()) {
    o.kinds = own;
    o.kinds.insert(o.kinds.end(), others.begin(), others.end());
  }
}

void run(BenchOptions& o) {
  LSHMOE_VALIDATE(!same_output(o.json, o.plot), "--json and --plot name the same file, '", o.plot,
                  "' (one would overwrite the other): name two");
  o.json = with_stdout_to_itself(o.json);
  const std::vector<Case> cases = make_cases(o);
  at::set_num_threads(1);
  const Rows rows = split_rows(o);
  std::optional<MetricsWriter> lines;
  if (!o.json.empty()) lines.emplace(o.json);
  if (!o.plot.empty()) check_writable(o.plot);

  std::printf(
      "%s: %s x %lld, %s, groups of %lld; fitted to %s before them\n"
      "errors relative to the row's norm (by group, and max of lsh: as the bound); MB/s of these "
      "rows, by the time that one thread computes; Gbit/s of a link below which coding pays, "
      "against bf16 and fp8\n\n",
      o.input.c_str(), counted(rows.x.size(0), "row").c_str(),
      static_cast<long long>(rows.x.size(1)), rows.x.scalar_type() == at::kFloat ? "fp32" : "bf16",
      static_cast<long long>(o.group_rows), counted(rows.fit.size(0), "row").c_str());
  std::printf("%-34s %6s %8s %8s %8s %8s %8s %8s %8s %8s %8s %9s\n", "codec", "bound", "bits/el",
              "mean", "p99", "max", "enc MB/s", "dec MB/s", "Gb/s b16", "Gb/s fp8", "clusters",
              "state B");

  Case fp8;
  fp8.kind = "fp8";
  fp8.codec.kind("fp8");
  fp8.codec.rounding("nearest");
  const Result fp8_result = measure_codec(fp8, rows, o.repeat, o.phases);
  const bool measured = o.phases || o.device == "cuda";
  const double bandwidth = measured ? copy_bandwidth(rows.x.device()) : 0;
  if (measured) std::printf("a copy reads and writes %.1f GB/s\n", 1e-9 * bandwidth);
  std::vector<PlotSeries> series;
  for (const Case& c : cases) {
    const Result result = c.kind == "fp8" && c.rounding == "nearest" ? fp8_result
                          : c.is_library() ? measure_codec(c, rows, o.repeat, o.phases)
                                           : measure_format(c, rows);
    Line line = report(c, result, rows, fp8_result, bandwidth);
    if (!result.encode_phases.empty()) {
      line.json["phases"] = report_phases(result, rows, bandwidth, c.transform == "basis");
    }
    if (!result.encode_stream.empty()) line.json["phases"] = report_stream(result, rows);
    flush_stdout();
    if (lines) lines->write(line.json);
    const string name = c.name();
    auto at = std::find_if(series.begin(), series.end(),
                           [&](const PlotSeries& one) { return one.name == name; });
    if (at == series.end()) at = series.insert(at, {name, {}});
    at->points.push_back(line.point);
  }
  if (!o.plot.empty()) {
    const string stem = std::filesystem::path(o.input).stem().string();
    write_file_atomically(o.plot, rate_distortion_svg("Codecs on " + stem, series));
  }
}

}  // namespace

int bench_codec(int argc, char** argv) {
  BenchOptions o;
  OptionParser parser("lshmoe-bench codec",
                      "Bits, errors and speed of codecs on the rows of a file, one thread.");
  add_options(parser, o);
  if (!parser.parse(argc, argv)) return 0;
  check(o);
  Session session(argc, argv);  // several processes would write the same files
  return session.run([&] {
    const auto world = session.world();
    if (world->size() == 1) {
      run(o);
      return 0;
    }
    if (world->rank() == 0) {
      log_error(detail::message("lshmoe-bench codec on ", world->size(),
                                " ranks (it measures one process): start it without mpirun"));
    }
    return 1;
  });
}

}  // namespace lshmoe::launch
