#include "lshmoe/launch/study.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>

#include "lshmoe/launch/trainer.hpp"
#include "lshmoe/runtime/abandon.hpp"
#include "lshmoe/runtime/error.hpp"
#include "lshmoe/runtime/files.hpp"
#include "lshmoe/runtime/metrics.hpp"

namespace lshmoe::launch {
namespace {

constexpr int64_t kNoiseBatches = 8;
constexpr double kNone = std::numeric_limits<double>::quiet_NaN();

/// What a codec adds to the gradient. Squared L2 norms over the whole model.
struct GradientNoise {
  double batch = kNone;  ///< variance of the uncompressed gradient from batch to batch
  double codec = kNone;  ///< mean squared difference that the codec makes
  double bias = kNone;   ///< of that, the square of the mean difference (unbiased estimate)
};

struct Run {
  std::string setting;
  int64_t seed = 0, steps = 0;
  double eval_loss = kNone, bytes_sent = 0, bytes_raw = 0, bytes_reference = kNone;
  double step_ms = kNone, codec_ms = kNone, alltoall_ms = kNone;  ///< medians over the steps
  GradientNoise noise;
  bool stopped = false;
};

double median(std::vector<double> values) {
  if (values.empty()) return kNone;
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

TrainOptions uncompressed(TrainOptions options) { return with_setting(options, "--compress none"); }

Gradient difference(const Gradient& a, const Gradient& b) {
  return {a.shared - b.shared, a.experts - b.experts};
}

void add(Gradient& sum, const Gradient& g, double scale) {
  sum.shared.add_(g.shared, scale);
  sum.experts.add_(g.experts, scale);
}

/// Variance from batch to batch, and the square of the mean without what that variance adds to it.
struct Moments {
  double variance, squared_mean;
};
Moments moments(const Trainer& trainer, const std::vector<Gradient>& gradients) {
  const auto n = static_cast<double>(gradients.size());
  Gradient mean = {at::zeros_like(gradients[0].shared), at::zeros_like(gradients[0].experts)};
  for (const Gradient& g : gradients) add(mean, g, 1 / n);
  double variance = 0;
  for (const Gradient& g : gradients) variance += trainer.squared_norm(difference(g, mean));
  variance /= n - 1;
  return {variance, trainer.squared_norm(mean) - variance / n};
}

GradientNoise gradient_noise(Trainer& trainer, const TrainOptions& options,
                             const ExpertGroups& groups, const DataSource& data) {
  Trainer reference(uncompressed(options), groups, data);
  reference.copy_model(trainer);
  std::vector<Gradient> exact, added;
  for (int64_t batch = 1; batch <= kNoiseBatches; ++batch) {
    exact.push_back(reference.gradient(options.steps + batch));
    added.push_back(difference(trainer.gradient(options.steps + batch), exact.back()));
  }
  GradientNoise noise;
  noise.batch = moments(reference, exact).variance;
  noise.bias = moments(reference, added).squared_mean;
  noise.codec = 0;
  for (const Gradient& g : added) {
    noise.codec += reference.squared_norm(g) / static_cast<double>(kNoiseBatches);
  }
  return noise;
}

Run train_once(const TrainOptions& options, const ExpertGroups& groups, const DataSource& data,
               const std::function<bool()>& stop_requested) {
  Trainer trainer(options, groups, data);
  Run run;
  std::vector<double> step_ms, codec_ms, alltoall_ms;
  for (int64_t step = 1; step <= options.steps && !run.stopped; ++step) {
    const StepReport report = trainer.step(stop_requested());
    run.stopped = report.stop;
    if (report.abandoned || !report.skipped.empty()) continue;
    run.bytes_sent += report.bytes_sent;
    run.bytes_raw += report.bytes_raw;
    step_ms.push_back(1e3 * report.seconds.step);
    codec_ms.push_back(1e3 * report.seconds.codec);
    alltoall_ms.push_back(1e3 * report.seconds.alltoall);
    run.steps = step;
  }
  run.step_ms = median(step_ms);
  run.codec_ms = median(codec_ms);
  run.alltoall_ms = median(alltoall_ms);
  if (run.stopped) return run;
  try {
    run.eval_loss = trainer.evaluate();
    run.noise = gradient_noise(trainer, options, groups, data);
  } catch (const StepAbandoned& error) {
    if (error.reason != StepAbandoned::Reason::stop) {
      throw NotFinite(detail::message("after the last step: ", error.cause,
                                      " (training diverged): lower --lr, or set --clip-grad"));
    }
    run.stopped = true;
  }
  return run;
}

nlohmann::ordered_json to_json(const Run& r) {
  return {{"setting", r.setting},
          {"seed", r.seed},
          {"steps", r.steps},
          {"eval_loss", r.eval_loss},
          {"bytes_sent", r.bytes_sent},
          {"bytes_raw", r.bytes_raw},
          {"bytes_bf16_reference", r.bytes_reference},
          {"share", r.bytes_sent / r.bytes_reference},
          {"step_ms", r.step_ms},
          {"codec_ms", r.codec_ms},
          {"alltoall_ms", r.alltoall_ms},
          {"batch_noise", r.noise.batch},
          {"codec_noise", r.noise.codec},
          {"codec_bias", r.noise.bias}};
}

/// "-" where nothing was sent: on one rank.
std::string percent(double share) {
  char text[32] = "-";
  if (!std::isnan(share)) std::snprintf(text, sizeof text, "%.1f", 100 * share);
  return text;
}

void print_run(const Run& r) {
  std::printf(
      "seed %lld  held-out %.4f  %6s %% of bf16  step %.0f ms, codec %.0f ms  noise %.2g  %s\n",
      static_cast<long long>(r.seed), r.eval_loss,
      percent(r.bytes_sent / r.bytes_reference).c_str(), r.step_ms, r.codec_ms,
      r.noise.codec / r.noise.batch, r.setting.c_str());
  flush_stdout();
}

void print_table(const std::vector<std::string>& settings, const std::vector<Run>& runs) {
  const auto of = [&](const std::string& setting) {
    std::vector<const Run*> found;
    for (const Run& run : runs) {
      if (run.setting == setting) found.push_back(&run);
    }
    return found;
  };
  const auto mean = [](const std::vector<const Run*>& of_setting, auto value) {
    double sum = 0;
    for (const Run* run : of_setting) sum += value(*run);
    return sum / static_cast<double>(of_setting.size());
  };
  const auto reference = of(settings[0]);
  std::puts(
      "\n% of bf16: bytes sent over the bf16 bytes of the first setting's plan. held-out: nats a "
      "token, mean over\nthe seeds (smallest to largest); against the first setting: mean over the "
      "seeds of the differences.\nnoise: mean squared difference that the codec makes to the "
      "gradient over the gradient's variance from\nbatch to batch; bias: its part of that (about "
      "0: none).");
  std::printf("\n%9s  %8s %17s  %8s  %8s %8s  %8s %6s  %s\n", "% of bf16", "held-out", "",
              "against", "codec ms", "step ms", "noise", "bias", "setting");
  for (const std::string& setting : settings) {
    const auto all = of(setting);
    if (all.empty()) continue;
    const auto [least, most] =
        std::minmax_element(all.begin(), all.end(),
                            [](const Run* a, const Run* b) { return a->eval_loss < b->eval_loss; });
    double against = 0;  // seed by seed: both lists are in the seeds' order
    for (std::size_t i = 0; i < all.size(); ++i) {
      against += (all[i]->eval_loss - reference[i]->eval_loss) / static_cast<double>(all.size());
    }
    const double noise = mean(all, [](const Run& r) { return r.noise.codec; });
    const double bias =
        noise > 0 ? mean(all, [](const Run& r) { return r.noise.bias; }) / noise : 0;
    std::printf(
        "%9s  %8.4f (%.4f-%.4f)  %+8.4f  %8.1f %8.1f  %8.2g %6.2f  %s\n",
        percent(mean(all, [](const Run& r) { return r.bytes_sent / r.bytes_reference; })).c_str(),
        mean(all, [](const Run& r) { return r.eval_loss; }), (*least)->eval_loss,
        (*most)->eval_loss, against, mean(all, [](const Run& r) { return r.codec_ms; }),
        mean(all, [](const Run& r) { return r.step_ms; }),
        noise / mean(all, [](const Run& r) { return r.noise.batch; }), bias, setting.c_str());
  }
  flush_stdout();
}

std::vector<std::string> settings_of(const TrainOptions& options) {
  return options.study_setting.empty() ? default_study_settings() : options.study_setting;
}

bool is_of_setting(const OptionValue& option) {
  return option.group == "Compression" || option.name == "capacity-factor" ||
         option.name == "drop-policy";
}

}  // namespace

const std::vector<std::string>& default_study_settings() {
  static const std::vector<std::string> settings = {
      "--compress none",
      "--compress bf16",
      // about a half
      "--compress fp8",
      "--compress int8",
      "--compress lsh --max-error 0.01",
      "--compress bf16 --capacity-factor 0.5",
      // about a quarter
      "--compress int4",
      "--compress int4 --rounding-backward stochastic",
      "--compress lsh --max-error 0.1",
      "--compress lsh --restore source --refine 0 --hashes 1 --alpha 1",
      "--compress lsh --restore source --refine 0 --hashes 1",
      "--compress bf16 --capacity-factor 0.25",
      // about a sixth
      "--compress lsh --max-error 0.2 --codec-state learned",
      "--compress lsh --max-error 0.2 --codec-state learned --transform basis",
      "--compress lsh --restore source --refine 0 --hashes 1 --hash-dim 4 --alpha 1",
      "--compress lsh --restore source --refine 0 --hashes 1 --hash-dim 4",
      "--compress bf16 --capacity-factor 0.15",
  };
  return settings;
}

TrainOptions with_setting(const TrainOptions& options, const std::string& setting) {
  std::istringstream words(setting);
  std::vector<std::string> arguments = {"lshmoe-train"};
  for (std::string word; words >> word;) arguments.push_back(word);
  std::vector<const char*> argv;
  for (const std::string& argument : arguments) argv.push_back(argument.c_str());
  TrainOptions parsed{};
  OptionParser parser("lshmoe-train", "");
  add_train_options(parser, parsed);
  try {
    LSHMOE_VALIDATE(parser.parse(static_cast<int>(argv.size()), argv.data(), /*print_help=*/false),
                    "--help is not a setting: leave it out");
    for (const OptionValue& option : parser.values()) {
      LSHMOE_VALIDATE(
          !option.on_command_line || is_of_setting(option), "--", option.name,
          " is not of the codec (all else is equal in a study): give it beside --study, "
          "for all settings");
    }
  } catch (const InvalidArgument& error) {
    throw InvalidArgument(detail::message("study-setting '", setting, "': ", error.what()));
  }
  TrainOptions changed = options;
  use_codec_of(parsed, changed);
  changed.capacity_factor = parsed.capacity_factor;
  changed.drop_policy = parsed.drop_policy;
  return changed;
}

void check_beside_study(const OptionParser& parser) {
  for (const OptionValue& option : parser.values()) {
    LSHMOE_VALIDATE(!option.on_command_line || !is_of_setting(option), "--", option.name,
                    " with --study (every setting of a study says its own codec and capacity): put "
                    "it into a --study-setting, or leave it out");
  }
}

void validate_study(const TrainOptions& options, int world_size) {
  LSHMOE_VALIDATE(options.study_seeds >= 1, "study-seeds is ", options.study_seeds,
                  " (must be at least 1)");
  bool on_self = false;
  const std::vector<std::string> settings = settings_of(options);
  for (const std::string& setting : settings) {
    LSHMOE_VALIDATE(std::count(settings.begin(), settings.end(), setting) == 1, "study-setting '",
                    setting, "' is given twice (its runs would be equal): give it once");
    const TrainOptions changed = with_setting(options, setting);
    on_self |= changed.codec_on_self;
    try {
      validate(changed, world_size);
    } catch (const InvalidArgument& error) {
      throw InvalidArgument(detail::message("study-setting '", setting, "': ", error.what()));
    }
  }
  LSHMOE_VALIDATE(effective_ep_size(options, world_size) > 1 || on_self,
                  "study on one rank, or with ep-size 1 (no row is sent to another rank, so there "
                  "is nothing to compare): start more ranks with mpirun -n, or put --codec-on-self "
                  "into the settings for all but the bytes");
}

void study(const TrainOptions& options, const ExpertGroups& groups,
           const std::function<std::unique_ptr<DataSource>(const TrainOptions&)>& open_data,
           const std::function<bool()>& stop_requested) {
  const std::vector<std::string> settings = settings_of(options);
  const bool speaks = groups.world->rank() == 0;
  std::optional<MetricsWriter> metrics;
  if (speaks && !options.metrics.empty()) metrics.emplace(options.metrics);
  std::vector<Run> runs;
  bool stopped = false;
  for (int64_t seed = options.seed; seed < options.seed + options.study_seeds && !stopped; ++seed) {
    TrainOptions of_seed = options;
    of_seed.seed = seed;
    const std::unique_ptr<DataSource> data = open_data(of_seed);
    double bytes_reference = kNone;
    for (const std::string& setting : settings) {
      Run run = train_once(with_setting(of_seed, setting), groups, *data, stop_requested);
      stopped = run.stopped;
      if (stopped) break;  // half a run says nothing
      if (std::isnan(bytes_reference)) bytes_reference = run.bytes_raw;
      run.setting = setting;
      run.seed = seed;
      run.bytes_reference = bytes_reference;
      runs.push_back(run);
      if (metrics) metrics->write(to_json(run));
      if (speaks) print_run(run);
    }
  }
  if (!speaks) return;
  print_table(settings, runs);
  if (stopped) std::puts("stopped before the last run");
}

}  // namespace lshmoe::launch
