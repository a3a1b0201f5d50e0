#include "lshmoe/launch/bench_layer.hpp"

#include <torch/torch.h>

#include <algorithm>
#include <array>
#include <boost/program_options.hpp>
#include <cmath>
#include <cstdio>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "lshmoe/comm/groups.hpp"
#include "lshmoe/comm/session.hpp"
#include "lshmoe/launch/bench_timing.hpp"
#include "lshmoe/moe/layer.hpp"
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

constexpr double kNone = std::numeric_limits<double>::quiet_NaN();

struct LayerBenchOptions {
  int64_t hidden_size = 0, ffn_hidden_size = 0, num_experts = 0, top_k = 0, tokens = 0, repeat = 0,
          max_clusters = 0;
  string dtype, device, json;
  string compress, compress_backward, restore, state, transform;
  double max_error = 0, max_error_backward = 0;  // NaN: as forward
  bool codec_on_self = false, aux_loss = false;
};

/// Milliseconds of one repetition, phase by phase, in the table's order.
using Times = std::vector<std::pair<string, double>>;

/// One column of the table.
struct Measured {
  string name;
  std::map<string, std::vector<double>> milliseconds;
  std::vector<string> phases;  // in order
  double bytes_sent = 0, bytes_raw = 0, plan_bytes = 0, max_error_ratio = 0;
  int64_t state_version = 0;             // fits of the learned states, all directions
  std::vector<double> fit_milliseconds;  // of the refreshes that fitted, warming up included
  [[nodiscard]] double ms(const string& phase) const {
    const auto at = milliseconds.find(phase);
    return at == milliseconds.end() ? 0 : median(at->second);
  }
};

/// The textbook layer on this rank alone: as many rows as the layer's experts get here on average,
/// expert after expert, nothing sent. The parameters are copies of the layer's.
class Reference {
 public:
  Reference(const MoELayer& layer, int64_t top_k, bool grouped) : top_k_(top_k), grouped_(grouped) {
    const auto copy = [](const at::Tensor& from) { return from.detach().clone().requires_grad_(); };
    gate_ = copy(layer->gate->weight);
    w1_ = copy(layer->experts->w1);
    b1_ = copy(layer->experts->b1);
    w2_ = copy(layer->experts->w2);
    b2_ = copy(layer->experts->b2);
  }

  at::Tensor forward(const at::Tensor& x) const {
    const int64_t local = w1_.size(0);
    auto [weights, ids] = at::linear(x.to(gate_.scalar_type()), gate_).softmax(-1).topk(top_k_);
    if (top_k_ > 1) weights = weights / weights.sum(-1, true);
    ids = ids.remainder(local).flatten();
    const at::Tensor order = ids.argsort(/*stable=*/true, /*dim=*/0);
    const at::Tensor token = order.div(top_k_, "floor"), expert = ids.index_select(0, order);
    const at::Tensor rows = x.index_select(0, token);
    const at::Tensor y = grouped_ ? grouped_experts(rows, expert) : loop_experts(rows, expert);
    const at::Tensor weighted =
        y * weights.flatten().index_select(0, order).unsqueeze(1).to(y.scalar_type());
    return at::zeros_like(x).index_add(0, token, weighted);
  }
  [[nodiscard]] std::vector<at::Tensor> parameters() const { return {gate_, w1_, b1_, w2_, b2_}; }

 private:
  int64_t top_k_;
  bool grouped_;
  at::Tensor gate_, w1_, b1_, w2_, b2_;

  at::Tensor loop_experts(const at::Tensor& rows, const at::Tensor& expert) const {
    const at::Tensor counts = expert.bincount({}, w1_.size(0)).cpu();
    std::vector<at::Tensor> parts;
    int64_t first = 0;
    for (int64_t e = 0; e < w1_.size(0); ++e) {
      const int64_t count = counts[e].item<int64_t>();
      parts.push_back(at::linear(at::gelu(at::linear(rows.narrow(0, first, count), w1_[e], b1_[e])),
                                 w2_[e], b2_[e]));
      first += count;
    }
    return at::cat(parts);
  }
  at::Tensor grouped_experts(const at::Tensor& rows, const at::Tensor& expert) const {
    const at::Tensor ends = expert.bincount({}, w1_.size(0)).cumsum(0).to(at::kInt);
    const at::Tensor inner = at::_grouped_mm(rows, w1_.transpose(1, 2), ends);
    const at::Tensor h = at::gelu(inner + b1_.index_select(0, expert));
    return at::_grouped_mm(h, w2_.transpose(1, 2), ends) + b2_.index_select(0, expert);
  }
};

/// Everything of one run: the groups, the inputs, and how a repetition is timed.
class Bench {
 public:
  Bench(const LayerBenchOptions& o, Session& session)
      : o_(o),
        world_(session.world()),
        groups_(make_expert_groups(world_, 0)),
        device_(o.device == "cuda"
                    ? at::Device(at::kCUDA, static_cast<at::DeviceIndex>(session.select_device()))
                    : at::Device(at::kCPU)),
        dtype_(o.dtype == "bf16" ? at::kBFloat16 : at::kFloat) {
    at::Generator generator =
        at::make_generator<at::CPUGeneratorImpl>(static_cast<uint64_t>(1 + world_->rank()));
    // Rows near some centers, as tokens are; the gate's choices are about even.
    const at::Tensor centers = at::randn({64, o.hidden_size}, generator);
    const at::Tensor id = at::randint(64, {o.tokens}, generator, at::kLong);
    x_ = (centers.index_select(0, id) + 0.3 * at::randn({o.tokens, o.hidden_size}, generator))
             .to(dtype_)
             .to(device_);
    grad_ = at::randn({o.tokens, o.hidden_size}, generator).to(dtype_).to(device_);
  }

  /// aux_loss_scope "": without an aux loss.
  [[nodiscard]] MoELayer make_layer(bool compressed, const string& aux_loss_scope = "") const {
    MoELayerOptions options(o_.hidden_size, o_.ffn_hidden_size, o_.num_experts);
    options.layer(0);  // all have the same weights
    options.top_k(o_.top_k).codec_on_self(o_.codec_on_self);
    if (!aux_loss_scope.empty()) options.aux_loss_coeff(0.01).aux_loss_scope(aux_loss_scope);
    if (compressed) {
      const auto codec = CodecOptions()
                             .kind(o_.compress)
                             .restore(o_.restore)
                             .max_error(o_.max_error)
                             .state(o_.state)
                             .transform(o_.transform)
                             .max_clusters(o_.max_clusters);
      CodecOptions backward = codec;
      backward.kind(o_.compress_backward.empty() ? o_.compress : o_.compress_backward);
      if (!std::isnan(o_.max_error_backward)) backward.max_error(o_.max_error_backward);
      options.codec(codec);
      if (o_.restore == "expert") options.codec_backward(backward);
    }
    MoELayer layer(options, groups_);
    layer->to(device_);
    layer->experts->to(dtype_);  // as they would be kept
    return layer;
  }

  /// Times one repetition; the slowest rank counts.
  Times run_layer(MoELayer& layer, Measured& measured) {
    layer->zero_grad();
    const at::Tensor leaf = x_.clone().requires_grad_();
    MoEOutput out;
    const double forward = timed([&] { out = layer->forward(leaf); });
    std::vector<at::Tensor> roots{out.output}, gradients{grad_};
    if (out.aux_loss.requires_grad()) {
      roots.push_back(out.aux_loss);
      gradients.push_back(at::ones_like(out.aux_loss));
    }
    const double backward = timed([&] { torch::autograd::backward(roots, gradients); });
    Times times{{"forward", forward}, {"backward", backward}, {"all", forward + backward}};
    const ExchangeStats& exchange = *out.stats.exchange;
    double codec = 0, wire = 0;
    std::array<double, 3> bytes{};
    measured.max_error_ratio = 0;
    for (const DirectionStats& direction : exchange.direction) {
      codec += direction.codec_time.seconds();
      wire += direction.exchange_time.seconds();
      bytes[0] += static_cast<double>(direction.codec_bytes + direction.plan_bytes);
      bytes[1] += static_cast<double>(direction.bytes_raw);
      bytes[2] += static_cast<double>(direction.plan_bytes);
      measured.max_error_ratio = std::max(measured.max_error_ratio, direction.max_error_ratio);
    }
    world_->all_reduce(std::span<double>(bytes), ReduceOp::sum, Purpose::control);
    measured.bytes_sent = bytes[0];
    measured.bytes_raw = bytes[1];
    measured.plan_bytes = bytes[2];
    times.emplace_back("experts", 1e3 * slowest(out.stats.expert_time->seconds()));
    times.emplace_back("codec", 1e3 * slowest(codec));
    times.emplace_back("exchange", 1e3 * slowest(wire));
    refresh(layer, measured);
    return times;
  }
  Times run_reference(const Reference& reference) {
    for (at::Tensor parameter : reference.parameters()) parameter.mutable_grad() = at::Tensor();
    const at::Tensor leaf = x_.clone().requires_grad_();
    at::Tensor y;
    const double forward = timed([&] { y = reference.forward(leaf); });
    const double backward = timed([&] { y.backward(grad_); });
    return {{"forward", forward}, {"backward", backward}, {"all", forward + backward}};
  }

  /// How far the layer's output is from the reference's, relative; a world of one only.
  [[nodiscard]] double difference(MoELayer& layer, const Reference& reference) {
    const at::NoGradGuard no_grad;
    const at::Tensor want = reference.forward(x_).to(at::kDouble);
    const at::Tensor got = layer->forward(x_).output.to(at::kDouble);
    return ((got - want).norm() / want.norm()).item<double>();
  }

  /// Whether torch multiplies groups of these rows here.
  [[nodiscard]] bool has_grouped() const {
    if (dtype_ != at::kBFloat16) return false;
    try {
      const auto options = at::dtype(dtype_).device(device_);
      const at::Tensor rows = at::zeros({16, 16}, options).requires_grad_();
      const at::Tensor weights = at::zeros({1, 16, 16}, options).requires_grad_();
      at::_grouped_mm(rows, weights.transpose(1, 2),
                      at::full({1}, 16, at::dtype(at::kInt).device(device_)))
          .sum()
          .backward();
      return true;
    } catch (const c10::Error&) {
      return false;
    }
  }
  [[nodiscard]] Communicator& world() const { return *world_; }
  [[nodiscard]] at::Device device() const { return device_; }

 private:
  const LayerBenchOptions& o_;
  std::shared_ptr<Communicator> world_;
  ExpertGroups groups_;
  at::Device device_;
  at::ScalarType dtype_;
  at::Tensor x_, grad_;

  template <class Part>
  double timed(Part part) {
    world_->barrier();
    return 1e3 * slowest(wall_time(part, device_));
  }
  void refresh(MoELayer& layer, Measured& measured) {
    const double milliseconds = timed([&] { layer->refresh_codecs(); });
    int64_t version = 0;
    for (const Direction direction : {Direction::dispatch, Direction::combine,
                                      Direction::combine_backward, Direction::dispatch_backward}) {
      version += layer->dispatcher().state_stats(direction).version;
    }
    if (version != measured.state_version) measured.fit_milliseconds.push_back(milliseconds);
    measured.state_version = version;
  }
  double slowest(double seconds) {
    world_->all_reduce(std::span<double>(&seconds, 1), ReduceOp::max, Purpose::control);
    return seconds;
  }
};

void add(Measured& measured, const Times& times) {
  for (const auto& [phase, ms] : times) {
    auto& list = measured.milliseconds[phase];
    if (list.empty()) measured.phases.push_back(phase);
    list.push_back(ms);
  }
}

/// Gbit/s of a rank's link below which coding pays: bits saved over the seconds spent coding. NaN:
/// nothing is sent, or coding took no longer than the plain copies, within the noise. 0: it saves
/// nothing.
double break_even(const Measured& compressed, const Measured& plain, int ranks) {
  const double saved = plain.bytes_raw + plain.plan_bytes - compressed.bytes_sent;
  const double seconds = 1e-3 * (compressed.ms("codec") - plain.ms("codec"));
  if (ranks == 1 || seconds <= 0) return kNone;
  return 8e-9 * std::max(0.0, saved) / ranks / seconds;
}

void report(const LayerBenchOptions& o, const std::vector<Measured>& all, int ranks,
            std::optional<MetricsWriter>& lines) {
  const Measured& plain = all[0];
  const auto reference = std::find_if(all.begin(), all.end(), [](const Measured& one) {
    return one.name.starts_with("reference");
  });
  // Two products an expert, a multiplication and an addition each; the backward twice as many.
  const double operations = 12.0 * static_cast<double>(o.tokens * o.top_k) *
                            static_cast<double>(o.hidden_size * o.ffn_hidden_size);
  std::printf("%-22s %10s %10s %10s %10s %10s %10s %9s %9s %10s %10s\n", "milliseconds", "all",
              "forward", "backward", "experts", "codec", "exchange", "of refer.", "TFLOP/s",
              "MB sent", "Gb/s even");
  for (const Measured& one : all) {
    // Ratios of the repetitions, which ran one after the other.
    std::vector<double> ratios;
    const auto& own = one.milliseconds.at("all");
    for (std::size_t i = 0; i < own.size(); ++i) {
      ratios.push_back(own[i] / reference->milliseconds.at("all")[i]);
    }
    const bool codes = o.compress != "none" && &one == &all[1];
    const double even = codes ? break_even(one, plain, ranks) : kNone;
    const double rate = 1e-9 * operations / one.ms("all");
    std::printf("%-22s", one.name.c_str());
    for (const char* phase : {"all", "forward", "backward", "experts", "codec", "exchange"}) {
      if (one.milliseconds.contains(phase)) {
        std::printf(" %10.3f", one.ms(phase));
      } else {
        std::printf(" %10s", "-");
      }
    }
    std::printf(" %9.3f %9.3f %10.3f", median(ratios), rate, 1e-6 * one.bytes_sent);
    if (std::isnan(even)) {
      std::printf(" %10s\n", "-");
    } else {
      std::printf(" %10.2f\n", even);
    }
    if (!one.fit_milliseconds.empty()) {
      const auto fits = static_cast<int64_t>(one.fit_milliseconds.size());
      std::printf("  learned states: %s between repetitions, %.3f ms each\n",
                  counted(fits, "fit").c_str(), median(one.fit_milliseconds));
    }

    nlohmann::ordered_json json;
    json["variant"] = one.name;
    json["device"] = o.device;
    json["dtype"] = o.dtype;
    json["ranks"] = ranks;
    json["tokens"] = o.tokens;
    json["hidden"] = o.hidden_size;
    json["ffn_hidden"] = o.ffn_hidden_size;
    json["num_experts"] = o.num_experts;
    json["top_k"] = o.top_k;
    json["repetitions"] = own.size();
    for (const string& phase : one.phases) json["ms"][phase] = one.ms(phase);
    if (!one.fit_milliseconds.empty()) json["ms"]["fit"] = median(one.fit_milliseconds);
    json["fits"] = one.fit_milliseconds.size();
    const auto [least, most] = std::minmax_element(own.begin(), own.end());
    json["ms"]["least"] = *least;
    json["ms"]["most"] = *most;
    json["of_reference"] = median(ratios);
    json["tflop_s"] = rate;
    json["bytes_sent"] = one.bytes_sent;
    json["bytes_raw"] = one.bytes_raw;
    json["max_error_ratio"] = one.max_error_ratio;
    json["break_even_gbit_s"] = even;
    if (lines) lines->write(json);
  }
  flush_stdout();
}

int run(const LayerBenchOptions& o, Session& session) {
  at::set_num_threads(1);
  Bench bench(o, session);
  const int ranks = bench.world().size();
  std::vector<Measured> measured;
  std::vector<std::function<Times(Measured&)>> runs;
  const auto add_layer = [&](const string& name, bool compressed, const string& aux_scope = "") {
    auto layer = std::make_shared<MoELayer>(bench.make_layer(compressed, aux_scope));
    measured.emplace_back().name = name;
    runs.push_back([&bench, layer](Measured& one) { return bench.run_layer(*layer, one); });
    return layer;
  };
  const auto plain = add_layer("lshmoe, uncompressed", false);
  if (o.compress != "none") add_layer("lshmoe, " + o.compress, true);
  if (o.aux_loss) {
    for (const char* scope : {"rank", "world"})
      add_layer("aux loss of " + string(scope), false, scope);
  }
  std::optional<double> difference;
  const auto add_reference = [&](const string& name, bool grouped) {
    auto reference = std::make_shared<Reference>(*plain, o.top_k, grouped);
    measured.emplace_back().name = name;
    runs.push_back([&bench, reference](Measured&) { return bench.run_reference(*reference); });
    if (ranks > 1) return;
    difference = std::max(difference.value_or(0), bench.difference(*plain, *reference));
  };
  if (bench.has_grouped()) add_reference("reference, grouped", true);
  add_reference("reference, loop", false);
  LSHMOE_VALIDATE(difference.value_or(0) < (o.dtype == "bf16" ? 0.05 : 1e-3),
                  "the layer's output is ", *difference,
                  " from the reference's (they do not compute the same): this is a bug");

  std::optional<MetricsWriter> lines;
  if (bench.world().rank() == 0 && !o.json.empty()) lines.emplace(o.json);
  constexpr int64_t kWarmUp = 2;
  for (int64_t i = -kWarmUp; i < o.repeat; ++i) {
    for (std::size_t r = 0; r < runs.size(); ++r) {
      const Times times = runs[r](measured[r]);
      if (i >= 0) add(measured[r], times);
    }
  }
  if (bench.world().rank() != 0) return 0;
  std::printf(
      "%s, %s each, hidden %lld, ffn %lld, %s, top-%lld, %s, %s; medians of %lld, the slowest "
      "rank's; MB of all ranks; Gbit/s of a rank's link below which coding pays\n",
      counted(ranks, "rank").c_str(), counted(o.tokens, "token").c_str(),
      static_cast<long long>(o.hidden_size), static_cast<long long>(o.ffn_hidden_size),
      counted(o.num_experts, "expert").c_str(), static_cast<long long>(o.top_k), o.dtype.c_str(),
      bench.device().str().c_str(), static_cast<long long>(o.repeat));
  if (difference) std::printf("outputs differ by %.2g from the reference's\n", *difference);
  std::printf("\n");
  report(o, measured, ranks, lines);
  return 0;
}

void add_options(OptionParser& parser, LayerBenchOptions& o) {
  const auto size = [](int64_t& variable, int64_t standard) {
    return po::value(&variable)->default_value(standard);
  };
  parser.group("Layer").add_options()("hidden-size", size(o.hidden_size, 1024), "of a token")(
      "ffn-hidden-size", size(o.ffn_hidden_size, 4096), "width of an expert")(
      "num-experts", size(o.num_experts, 8), "over all ranks")(
      "top-k", size(o.top_k, 2), "experts a token")("tokens", size(o.tokens, 1024), "of a rank")(
      "aux-loss", po::bool_switch(&o.aux_loss),
      "two more lines: uncompressed, with an aux loss of each rank's load, and of the world's")(
      "dtype", po::value(&o.dtype)->default_value("fp32"), "fp32 or bf16")(
      "device", po::value(&o.device)->default_value("cpu"), "cpu or cuda (a GPU a local rank)")(
      "repeat", size(o.repeat, 11), "timed repetitions, after two to warm up; medians count");
  parser.group("Codec").add_options()(
      "compress", po::value(&o.compress)->default_value("none"),
      "what travels: none, bf16, fp8, int8, int4 or lsh; beside it always none; the options below "
      "are refused without it")("compress-backward",
                                po::value(&o.compress_backward)->default_value(""),
                                "of the two backward exchanges; default: as forward")(
      "max-error", po::value(&o.max_error)->default_value(0.1, "0.1"), "lsh: bound of a row")(
      "max-error-backward", po::value(&o.max_error_backward)->default_value(kNone, "as forward"),
      "of the two backward exchanges")("restore", po::value(&o.restore)->default_value("expert"),
                                       "lsh: expert or source")(
      "codec-state", po::value(&o.state)->default_value("batch"), "lsh: batch or learned")(
      "transform", po::value(&o.transform)->default_value("channels"),
      "lsh: channels, or basis (learned)")("max-clusters", size(o.max_clusters, 128),
                                           "lsh: centroids of a group at most")(
      "codec-on-self", po::bool_switch(&o.codec_on_self),
      "rows for the own rank pass the codec too: its time on one rank");
  parser.group_needs({"compress"},
                     " (only the uncompressed layer is measured): add --compress lsh, "
                     "or --compress none if that is meant, or leave it out");
  parser.group("Output").add_options()("json", po::value(&o.json)->value_name("FILE"),
                                       "one object a line for each line of the table; - or "
                                       "/dev/stdout: the table goes to standard error");
}

void check(const LayerBenchOptions& o) {
  LSHMOE_VALIDATE(o.dtype == "fp32" || o.dtype == "bf16", "unknown dtype '", o.dtype,
                  "': use --dtype fp32 or bf16");
  LSHMOE_VALIDATE(o.device == "cpu" || o.device == "cuda", "unknown device '", o.device,
                  "': use --device cpu or cuda");
  check_at_least("hidden-size", o.hidden_size, 1);
  check_at_least("ffn-hidden-size", o.ffn_hidden_size, 1);
  check_at_least("num-experts", o.num_experts, 1);
  check_at_least("top-k", o.top_k, 1);
  check_at_least("tokens", o.tokens, 1);
  check_at_least("repeat", o.repeat, 1);
}

}  // namespace

int bench_layer(int argc, char** argv) {
  LayerBenchOptions o;
  try {
    OptionParser parser("lshmoe-bench layer",
                        "Forward and backward of the MoE layer, with and without compression, "
                        "beside a plain layer without exchange; one thread a rank.");
    add_options(parser, o);
    if (!parser.parse(argc, argv)) return 0;
    check(o);
    o.json = with_stdout_to_itself(o.json);
  } catch (const std::exception& error) {
    log_error(error.what());
    return 1;
  }
  Session session(argc, argv);
  return session.run([&] { return run(o, session); });
}

}  // namespace lshmoe::launch
