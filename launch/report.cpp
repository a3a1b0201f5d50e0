#include "lshmoe/launch/report.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <nlohmann/json.hpp>

#include "lshmoe/runtime/error.hpp"
#include "lshmoe/runtime/files.hpp"

namespace lshmoe::launch {
namespace {

constexpr double kNone = std::numeric_limits<double>::quiet_NaN();
constexpr double kMebi = 1024.0 * 1024.0;

double ratio(double a, double b) { return b > 0 ? a / b : kNone; }

std::string format(const char* pattern, auto... values) {
  char text[256];
  std::snprintf(text, sizeof text, pattern, values...);
  return text;
}

std::string duration(double seconds) {
  const auto s = static_cast<long>(std::lround(seconds));
  if (s >= 3600) return format("%ld h %02ld min", s / 3600, s / 60 % 60);
  if (s >= 60) return format("%ld min %02ld s", s / 60, s % 60);
  return format("%ld s", s);
}

void print_line(const std::string& text) {
  std::fputs((text + "\n").c_str(), stdout);
  flush_stdout();
}

nlohmann::ordered_json bytes_by_direction(const StepReport& r) {
  nlohmann::ordered_json bytes;
  for (std::size_t d = 0; d < r.codec_bytes.size(); ++d) {
    bytes[std::string(name_of(static_cast<Direction>(d)))] = static_cast<int64_t>(r.codec_bytes[d]);
  }
  return bytes;
}

nlohmann::ordered_json to_json(const StepReport& r, int64_t tokens_per_step) {
  return {{"step", r.step},
          {"loss", r.loss},
          {"eval_loss", r.eval_loss},
          {"aux_loss", r.aux_loss},
          {"lr", r.lr},
          {"grad_norm", r.grad_norm},
          {"tokens_per_s", ratio(static_cast<double>(tokens_per_step), r.seconds.step)},
          {"step_ms", 1e3 * r.seconds.step},
          {"codec_ms", 1e3 * r.seconds.codec},
          {"codec_state_ms", 1e3 * r.seconds.codec_state},
          {"alltoall_ms", 1e3 * r.seconds.alltoall},
          {"expert_ms", 1e3 * r.seconds.experts},
          {"bytes_sent", static_cast<int64_t>(r.bytes_sent)},
          {"bytes_raw", static_cast<int64_t>(r.bytes_raw)},
          {"codec_bytes", bytes_by_direction(r)},
          {"plan_bytes", static_cast<int64_t>(r.plan_bytes)},
          {"codec_state_bytes", static_cast<int64_t>(r.codec_state_bytes)},
          {"codec_state_memory", static_cast<int64_t>(r.codec_state_memory)},
          {"codec_state_version", r.codec_state_version},
          {"rate", ratio(r.bytes_sent, r.bytes_raw)},
          {"max_relative_error", r.max_relative_error},
          {"max_error_ratio", r.max_error_ratio},
          {"expert_load_max_over_mean", r.expert_load_max_over_mean},
          {"expert_load", r.expert_load},
          {"dropped_tokens", r.dropped_tokens},
          {"skipped",
           r.skipped.empty() ? nlohmann::ordered_json() : nlohmann::ordered_json(r.skipped)}};
}

}  // namespace

Reporter::Reporter(const TrainOptions& options, const ExpertGroups& groups, const DataSource&,
                   int64_t num_parameters, int64_t tokens_per_step)
    : options_(options), tokens_per_step_(tokens_per_step), eval_loss_(kNone) {
  if (!options.metrics.empty()) metrics_ = std::make_unique<MetricsWriter>(options.metrics);
  const std::string place = options.device == "cuda" ? " on GPUs by " + options.comm_backend : "";
  using detail::counted;
  print_line(detail::message(counted(groups.world->size(), "rank"), place, ", ep-size ",
                             groups.expert->size(), ", ", counted(num_parameters, "parameter"),
                             ", ", counted(options.num_experts, "expert"), " top-", options.top_k,
                             ", compress ", options.compress, ", ", counted(options.steps, "step"),
                             " of ", counted(tokens_per_step, "token")));
}

void Reporter::add_skipped(const StepReport& r) {
  ++skipped_;
  if (metrics_) metrics_->write({{"step", r.step}, {"lr", r.lr}, {"skipped", r.skipped}});
  print_line(format("step %lld/%lld  skipped: ", static_cast<long long>(r.step),
                    static_cast<long long>(options_.steps)) +
             r.skipped);
}

void Reporter::add(const StepReport& r, double eval_seconds) {
  if (!r.skipped.empty()) return add_skipped(r);
  ++whole_steps_;
  last_ = r;
  sum_.seconds += r.seconds;
  sum_.bytes_sent += r.bytes_sent;
  sum_.bytes_raw += r.bytes_raw;
  for (std::size_t d = 0; d < r.codec_bytes.size(); ++d) sum_.codec_bytes[d] += r.codec_bytes[d];
  sum_.plan_bytes += r.plan_bytes;
  sum_.codec_state_bytes += r.codec_state_bytes;
  sum_.rows += r.rows;
  sum_.clusters += r.clusters;
  sum_.max_relative_error = std::max(sum_.max_relative_error, r.max_relative_error);
  sum_.max_error_ratio = std::max(sum_.max_error_ratio, r.max_error_ratio);
  const bool evaluated = std::isfinite(r.eval_loss);
  if (evaluated) {
    eval_loss_ = r.eval_loss;
    eval_seconds_ += eval_seconds;
  }
  if (metrics_) metrics_->write(to_json(r, tokens_per_step_));

  loss_since_line_ += r.loss;
  seconds_since_line_ += r.seconds.step;
  ++steps_since_line_;
  const bool due = r.step == 1 || r.step == options_.steps ||
                   r.step % std::max<int64_t>(1, options_.progress) == 0;
  if (options_.progress == 0 || !(due || evaluated || r.stop)) return;
  const double tokens = static_cast<double>(tokens_per_step_ * steps_since_line_);
  std::string line = format("step %lld/%lld  loss %.3f  %.0f tokens/s  ETA %s",
                            static_cast<long long>(r.step), static_cast<long long>(options_.steps),
                            loss_since_line_ / static_cast<double>(steps_since_line_),
                            tokens / seconds_since_line_,
                            duration(static_cast<double>(options_.steps - r.step) *
                                     sum_.seconds.step / static_cast<double>(whole_steps_))
                                .c_str());
  if (r.bytes_raw > 0) line += format("  sent %.1f %% of raw", 100 * r.bytes_sent / r.bytes_raw);
  if (evaluated) line += format("  held-out loss %.4f", r.eval_loss);
  print_line(line);
  loss_since_line_ = seconds_since_line_ = 0;
  steps_since_line_ = 0;
}

void Reporter::summary(bool stopped) const {
  const PhaseSeconds& s = sum_.seconds;
  print_line("");
  if (whole_steps_ == 0) {
    print_line("stopped before the first of " + detail::counted(options_.steps, "step") +
               " was whole");
    return;
  }
  const auto steps = static_cast<double>(whole_steps_);
  print_line(
      format("%s step %lld of %lld, %s of training (%.1f steps/s, %.0f tokens/s), %.1f s of "
             "evaluation",
             stopped ? "stopped after" : "finished with", static_cast<long long>(last_.step),
             static_cast<long long>(options_.steps), duration(s.step).c_str(), steps / s.step,
             steps * static_cast<double>(tokens_per_step_) / s.step, eval_seconds_));
  if (skipped_ > 0) {
    print_line("  skipped         " + detail::counted(skipped_, "step") + " (not finite)");
  }
  print_line(format("  training loss   %.4f nats a token (last step)", last_.loss));
  if (std::isfinite(eval_loss_)) {
    print_line(format("  held-out loss   %.4f nats a token", eval_loss_));
  }
  if (sum_.bytes_raw > 0) {
    print_line(format("  all-to-all      %.1f MiB sent, %.1f MiB raw (bf16): %.1f %%, %.1f MiB %s",
                      sum_.bytes_sent / kMebi, sum_.bytes_raw / kMebi,
                      100 * sum_.bytes_sent / sum_.bytes_raw,
                      std::abs(sum_.bytes_raw - sum_.bytes_sent) / kMebi,
                      sum_.bytes_sent <= sum_.bytes_raw ? "saved" : "more than raw"));
    const auto part = [&](double bytes) { return 100 * bytes / sum_.bytes_sent; };
    std::string parts = "  of the bytes   ";
    for (std::size_t d = 0; d < sum_.codec_bytes.size(); ++d) {
      parts += format(" %s %.1f %%,", std::string(name_of(static_cast<Direction>(d))).c_str(),
                      part(sum_.codec_bytes[d]));
    }
    print_line(parts + format(" plan %.1f %%, learned state %.1f %%", part(sum_.plan_bytes),
                              part(sum_.codec_state_bytes)));
    print_line(format(
        "  codec           %.0f rows and %.1f clusters a step; largest relative error "
        "%.4f, largest share of its bound %.4f",
        sum_.rows / steps, sum_.clusters / steps, sum_.max_relative_error, sum_.max_error_ratio));
  }
  if (last_.codec_state_version > 0) {
    print_line(format(
        "  learned state   version %lld: %.1f MiB of the bytes sent, %.1f s of the codec's time, "
        "%.1f MiB of memory a rank",
        static_cast<long long>(last_.codec_state_version), sum_.codec_state_bytes / kMebi,
        s.codec_state, last_.codec_state_memory / kMebi));
  }
  const double rest = s.step - s.experts - s.codec - s.alltoall - s.gradients - s.optimizer;
  const auto share = [&](double seconds) { return 100 * seconds / s.step; };
  print_line(
      format("  time            experts %.1f %%, codec %.1f %%, all-to-all %.1f %%, gradient "
             "reduction %.1f %%, optimizer %.1f %%, rest of the model %.1f %%",
             share(s.experts), share(s.codec), share(s.alltoall), share(s.gradients),
             share(s.optimizer), share(rest)));
}

}  // namespace lshmoe::launch
