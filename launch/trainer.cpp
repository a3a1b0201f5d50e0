#include "lshmoe/launch/trainer.hpp"

#include <ATen/record_function.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>
#include <span>

#include "lshmoe/comm/agreement.hpp"
#include "lshmoe/launch/device.hpp"
#include "lshmoe/launch/report.hpp"
#include "lshmoe/runtime/error.hpp"
#include "lshmoe/runtime/metrics.hpp"

namespace lshmoe::launch {
namespace {

constexpr Direction kDirections[] = {Direction::dispatch, Direction::combine,
                                     Direction::combine_backward, Direction::dispatch_backward};

class Clock {
 public:
  /// Seconds since the last call, or since it was made.
  double lap() {
    const auto now = std::chrono::steady_clock::now();
    const std::chrono::duration<double> passed = now - std::exchange(last_, now);
    return passed.count();
  }

 private:
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

/// Made on the CPU, so that its first parameters do not depend on the device.
LanguageModel make_model(const TrainOptions& options, const ExpertGroups& groups,
                         const DataSource& data, at::Device device) {
  LanguageModel model(model_options(options, data.vocab_size()), groups);
  if (!device.is_cpu()) model->to(device);
  return model;
}

/// Weight decay on matrices only: vectors are norms and biases (an expert's bias is [experts, n]).
std::unique_ptr<torch::optim::AdamW> make_optimizer(const TrainOptions& options,
                                                    const torch::nn::Module& model) {
  std::vector<at::Tensor> matrices, vectors;
  for (const auto& item : model.named_parameters()) {
    const std::string& name = item.key();
    const bool bias = name.ends_with(".b1") || name.ends_with(".b2");
    (item.value().dim() >= 2 && !bias ? matrices : vectors).push_back(item.value());
  }
  const auto settings = [&](double weight_decay) {
    return std::make_unique<torch::optim::AdamWOptions>(
        torch::optim::AdamWOptions(options.lr).betas({0.9, 0.95}).weight_decay(weight_decay));
  };
  std::vector<torch::optim::OptimizerParamGroup> groups;
  groups.emplace_back(matrices, settings(options.weight_decay));
  groups.emplace_back(vectors, settings(0.0));
  return std::make_unique<torch::optim::AdamW>(std::move(groups));
}

/// Adds up what all ranks have, field by field, in as few collectives as there are operations.
class Gathered {
 public:
  void sum(double& field) { add(sums_, field); }
  void max(double& field) { add(maxima_, field); }
  void reduce(Communicator& world) {
    reduce(world, sums_, ReduceOp::sum);
    reduce(world, maxima_, ReduceOp::max);
  }

 private:
  using Fields = std::vector<double*>;
  static void add(Fields& fields, double& field) { fields.push_back(&field); }
  static void reduce(Communicator& world, const Fields& fields, ReduceOp op) {
    std::vector<double> values;
    for (const double* field : fields) values.push_back(*field);
    world.all_reduce(std::span(values), op, Purpose::control);
    for (std::size_t i = 0; i < fields.size(); ++i) *fields[i] = values[i];
  }
  Fields sums_, maxima_;
};

/// Whether the error bound of that direction's rows is relative to their own norms. Where it is
/// not, a small row may lose all it has, and its relative error says nothing.
bool bound_by_row(const CodecOptions& codec, Direction direction) {
  if (codec.kind() != "lsh") return true;
  return resolved(codec, direction).error_reference() == "row";
}

void add_exchange(StepReport& report, const MoEStats& stats, const MoELayerOptions& layer) {
  report.seconds.experts += stats.expert_time->seconds();
  for (const Direction direction : kDirections) {
    const DirectionStats& d = (*stats.exchange)[direction];
    report.codec_bytes[static_cast<std::size_t>(direction)] += static_cast<double>(d.codec_bytes);
    report.plan_bytes += static_cast<double>(d.plan_bytes);
    report.bytes_raw += static_cast<double>(d.bytes_raw);
    report.rows += static_cast<double>(d.rows);
    report.clusters += static_cast<double>(d.clusters);
    report.seconds.codec += d.codec_time.seconds();
    report.seconds.alltoall += d.exchange_time.seconds();
    if (bound_by_row(layer.codec(direction), direction)) {
      report.max_relative_error = std::max(report.max_relative_error, d.max_relative_error);
    }
    report.max_error_ratio = std::max(report.max_error_ratio, d.max_error_ratio);
  }
}

/// The first block whose output is not finite, in words; made when the loss is not finite.
std::string first_not_finite(const std::vector<at::Tensor>& blocks) {
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    if (!at::isfinite(blocks[i]).all().item<bool>()) {
      return detail::message("first in what block ", i, " returns");
    }
  }
  return "all blocks return finite values";
}

std::vector<std::vector<int64_t>> rows_of(const at::Tensor& matrix) {
  std::vector<std::vector<int64_t>> rows;
  for (int64_t i = 0; i < matrix.size(0); ++i) {
    const auto* row = matrix[i].const_data_ptr<int64_t>();
    rows.emplace_back(row, row + matrix.size(1));
  }
  return rows;
}

}  // namespace

double learning_rate(const TrainOptions& o, int64_t step) {
  if (step <= o.warmup_steps) {
    return o.lr * static_cast<double>(step) / static_cast<double>(o.warmup_steps);
  }
  const double done = static_cast<double>(step - o.warmup_steps) /
                      static_cast<double>(std::max<int64_t>(1, o.steps - o.warmup_steps));
  return o.min_lr + 0.5 * (o.lr - o.min_lr) * (1.0 + std::cos(M_PI * std::min(1.0, done)));
}

PhaseSeconds& PhaseSeconds::operator+=(const PhaseSeconds& other) {
  experts += other.experts;
  codec += other.codec;
  codec_state += other.codec_state;
  alltoall += other.alltoall;
  gradients += other.gradients;
  optimizer += other.optimizer;
  step += other.step;
  return *this;
}

Trainer::Trainer(const TrainOptions& options, const ExpertGroups& groups, const DataSource& data)
    : options_(options),
      groups_(groups),
      data_(data),
      device_(device_of(options)),
      model_(make_model(options, groups, data, device_)),
      reducer_(groups, *model_),
      optimizer_(make_optimizer(options, *model_)) {}

Trainer::Accumulated Trainer::accumulate(int64_t step) {
  model_->train();
  const int64_t parts = options_.accumulate;
  const double share = 1.0 / static_cast<double>(parts);
  const int64_t first = groups_.world->rank() * options_.batch_size * parts;
  Accumulated sum;
  std::string where;  // the loss stopped being finite
  run_together(*groups_.world, [&] {
    for (int64_t part = 0; part < parts; ++part) {
      LanguageModelOutput out = model_->forward(on_device(
          data_.train_windows(step, first + part * options_.batch_size, options_.batch_size),
          device_));
      ((out.loss + out.aux_loss + out.z_loss) * share).backward();
      sum.loss += share * out.loss.item<double>();
      if (where.empty() && !std::isfinite(sum.loss)) where = first_not_finite(out.blocks);
      sum.aux_loss += share * out.aux_loss.item<double>();
      sum.stats.push_back(std::move(out.stats));
    }
    if (abandon_requested()) {
      throw StepAbandoned(StepAbandoned::Reason::stop, "a rank was asked to stop");
    }
    if (!where.empty()) {
      throw StepAbandoned(StepAbandoned::Reason::not_finite,
                          detail::message("loss ", std::abs(sum.loss), " on rank ",
                                          groups_.world->rank(), ", ", where));
    }
  });
  return sum;
}

void Trainer::abandon_for_gradient(double norm) {
  // Reduced, they are alike on all ranks: whose they were shows only before that.
  optimizer_->zero_grad(/*set_to_none=*/false);
  (void)accumulate(step_);
  run_together(*groups_.world, [&] {
    // A backward goes from the last parameters to the first: the last one is next to the cause.
    auto named = model_->named_parameters().items();
    std::reverse(named.begin(), named.end());
    for (const auto& item : named) {
      const at::Tensor& gradient = item.value().grad();
      if (!gradient.defined() || at::isfinite(gradient).all().item<bool>()) continue;
      throw StepAbandoned(StepAbandoned::Reason::not_finite,
                          detail::message("the gradient of ", item.key(), " is not finite on rank ",
                                          groups_.world->rank()));
    }
  });
  // On no rank: their sum, or its square, overflows.
  throw StepAbandoned(StepAbandoned::Reason::not_finite, detail::message("gradient norm ", norm));
}

StepReport Trainer::step(bool stop) {
  RECORD_FUNCTION("lshmoe::step", std::vector<c10::IValue>{});
  ++step_;
  try {
    StepReport report = whole_step(stop);
    skipped_in_a_row_ = 0;
    return report;
  } catch (const StepAbandoned& error) {
    // The next step would add to what this one left.
    optimizer_->zero_grad(/*set_to_none=*/false);
    discard_step(*model_);
    StepReport report;
    report.step = step_;
    report.lr = learning_rate(options_, step_);
    report.abandoned = report.stop = error.reason == StepAbandoned::Reason::stop;
    if (report.abandoned) return report;
    report.skipped = error.cause;
    if (++skipped_in_a_row_ > options_.skip_nonfinite) {
      throw NotFinite(detail::message(
          "step ", step_, ": ", error.cause, " (training diverged",
          options_.skip_nonfinite == 0
              ? ""
              : "; skipped before it: " + detail::counted(options_.skip_nonfinite, "step"),
          "): lower --lr, or set --clip-grad"));
    }
    report.stop = any_stops(stop);
    return report;
  }
}

StepReport Trainer::whole_step(bool stop) {
  Clock whole, phase;
  StepReport report;
  report.step = step_;
  report.lr = learning_rate(options_, step_);

  const Accumulated out = accumulate(step_);

  PhaseTimer gradient_time, optimizer_time;
  {
    const PhaseTimer::Span span(gradient_time, device_);
    reducer_.reduce();
    report.grad_norm = reducer_.clip_grad_norm(options_.clip_grad);
  }
  if (!std::isfinite(report.grad_norm)) abandon_for_gradient(report.grad_norm);
  {
    RECORD_FUNCTION("lshmoe::optimizer", std::vector<c10::IValue>{});
    const PhaseTimer::Span span(optimizer_time, device_);
    for (auto& group : optimizer_->param_groups()) {
      static_cast<torch::optim::AdamWOptions&>(group.options()).lr(report.lr);
    }
    optimizer_->step();
    // In place: the next backward adds to the same memory.
    optimizer_->zero_grad(/*set_to_none=*/false);
    model_->update_expert_bias();
  }
  phase.lap();
  const auto state_bytes = [&] { return groups_.expert->traffic(Purpose::codec_state).bytes_sent; };
  const std::uint64_t state_bytes_before = state_bytes();
  model_->refresh_codecs();
  report.codec_state_bytes = static_cast<double>(state_bytes() - state_bytes_before);
  report.seconds.codec_state = phase.lap();
  report.seconds.codec += report.seconds.codec_state;
  for (const Direction direction : kDirections) {
    for (const StateStats& state : model_->state_stats(direction)) {
      report.codec_state_memory += static_cast<double>(state.memory_bytes);
      report.codec_state_version = std::max(report.codec_state_version, state.version);
    }
  }

  report.loss = out.loss;
  report.seconds.gradients = gradient_time.seconds();
  report.seconds.optimizer = optimizer_time.seconds();
  report.aux_loss = out.aux_loss;
  const auto layers = static_cast<int64_t>(out.stats.front().size());
  // [0]: choices, [1]: of those dropped; of each layer and expert.
  at::Tensor load = at::zeros({2, layers, options_.num_experts}, at::kLong);
  for (const auto& micro_batch : out.stats) {
    for (std::size_t layer = 0; layer < micro_batch.size(); ++layer) {
      add_exchange(report, micro_batch[layer], model_->options.moe());
      const auto at_layer = static_cast<int64_t>(layer);
      load[0][at_layer] += micro_batch[layer].load.cpu();
      load[1][at_layer] += micro_batch[layer].dropped.cpu();
    }
  }
  report.seconds.step = whole.lap();

  const auto world_size = static_cast<double>(groups_.world->size());
  double stops = stop ? 1.0 : 0.0;
  Gathered gathered;
  double* const means[] = {&report.loss,
                           &report.aux_loss,
                           &report.seconds.experts,
                           &report.seconds.codec,
                           &report.seconds.codec_state,
                           &report.seconds.alltoall,
                           &report.seconds.gradients,
                           &report.seconds.optimizer,
                           &report.seconds.step};
  for (double* field : means) gathered.sum(*field);
  for (double* field : {&stops, &report.plan_bytes, &report.codec_state_bytes, &report.bytes_raw,
                        &report.rows, &report.clusters}) {
    gathered.sum(*field);
  }
  for (double& bytes : report.codec_bytes) gathered.sum(bytes);
  gathered.max(report.max_relative_error);
  gathered.max(report.max_error_ratio);
  gathered.max(report.codec_state_memory);
  gathered.reduce(*groups_.world);
  groups_.world->all_reduce(
      std::span(load.data_ptr<int64_t>(), static_cast<std::size_t>(load.numel())), ReduceOp::sum,
      Purpose::control);
  report.expert_load = rows_of(load[0]);
  report.dropped_tokens = rows_of(load[1]);
  for (double* field : means) *field /= world_size;
  report.bytes_sent = std::accumulate(report.codec_bytes.begin(), report.codec_bytes.end(),
                                      report.plan_bytes + report.codec_state_bytes);
  report.stop = stops > 0;
  const at::Tensor counts = load[0].to(at::kDouble);
  report.expert_load_max_over_mean =
      (std::get<0>(counts.max(1)) / counts.mean(1).clamp_min(1e-300)).max().item<double>();
  return report;
}

bool Trainer::any_stops(bool stop) {
  double stops = stop ? 1.0 : 0.0;
  groups_.world->all_reduce(std::span(&stops, 1), ReduceOp::max, Purpose::control);
  return stops > 0;
}

double Trainer::evaluate() {
  RECORD_FUNCTION("lshmoe::evaluate", std::vector<c10::IValue>{});
  const at::NoGradGuard no_grad;
  model_->eval();
  const int64_t windows = data_.num_eval_windows(), ranks = groups_.world->size(),
                rank = groups_.world->rank();
  const int64_t first = windows * rank / ranks, end = windows * (rank + 1) / ranks;
  // Every rank enters the same number of forward passes; one that has no windows left repeats its
  // last, or the first of all, and does not count it.
  const int64_t most = (windows + ranks - 1) / ranks;
  double sums[2] = {0, 0};  // loss x windows, windows
  run_together(*groups_.world, [&] {
    for (int64_t done = 0; done < most; done += options_.batch_size) {
      const int64_t count = std::min(options_.batch_size, end - first - done);
      const at::Tensor loss =
          model_
              ->forward(on_device(count > 0 ? data_.eval_windows(first + done, count)
                                            : data_.eval_windows(std::max<int64_t>(0, end - 1), 1),
                                  device_))
              .loss;
      if (count <= 0) continue;
      sums[0] += loss.item<double>() * static_cast<double>(count);
      sums[1] += static_cast<double>(count);
    }
  });
  groups_.world->all_reduce(std::span(sums), ReduceOp::sum, Purpose::control);
  return sums[0] / sums[1];
}

Gradient Trainer::gradient(int64_t step) {
  optimizer_->zero_grad(/*set_to_none=*/false);
  (void)accumulate(step);
  reducer_.reduce();
  const auto flat = [](const std::vector<at::Tensor>& parameters) {
    std::vector<at::Tensor> parts;
    for (const at::Tensor& p : parameters) parts.push_back(p.grad().reshape({-1}));
    return parts.empty() ? at::zeros({0}) : at::cat(parts);
  };
  Gradient gradient = {flat(reducer_.shared_parameters()), flat(reducer_.expert_parameters())};
  optimizer_->zero_grad(/*set_to_none=*/false);
  return gradient;
}

double Trainer::squared_norm(const Gradient& gradient) const {
  const auto of = [](const at::Tensor& flat) {
    return flat.to(at::kDouble).square().sum().item<double>();
  };
  double experts = of(gradient.experts);
  groups_.expert->all_reduce(std::span(&experts, 1), ReduceOp::sum, Purpose::control);
  return of(gradient.shared) + experts;
}

void Trainer::copy_model(const Trainer& from) {
  const at::NoGradGuard no_grad;
  const auto copy = [](const std::vector<at::Tensor>& to, const std::vector<at::Tensor>& source) {
    for (std::size_t i = 0; i < to.size(); ++i) to[i].copy_(source[i]);
  };
  copy(model_->parameters(), from.model_->parameters());
  copy(model_->buffers(), from.model_->buffers());
}

int64_t Trainer::num_parameters() {
  int64_t shared = 0, experts = 0;
  for (const at::Tensor& p : reducer_.shared_parameters()) shared += p.numel();
  for (const at::Tensor& p : reducer_.expert_parameters()) experts += p.numel();
  return shared + experts * groups_.expert->size();
}

int64_t Trainer::tokens_per_step() const {
  return groups_.world->size() * options_.batch_size * options_.accumulate * options_.seq_len;
}

void train(const TrainOptions& options, const ExpertGroups& groups, const DataSource& data,
           const std::function<bool()>& stop_requested) {
  Trainer trainer(options, groups, data);
  std::optional<Reporter> reporter;
  if (groups.world->rank() == 0) {
    reporter.emplace(options, groups, data, trainer.num_parameters(), trainer.tokens_per_step());
  }
  bool stopped = false;
  for (int64_t step = 1; step <= options.steps && !stopped; ++step) {
    StepReport report = trainer.step(stop_requested());
    stopped = report.stop;
    if (report.abandoned) break;  // the step before it was the last
    // A job that was asked to stop has about a second under mpirun: no evaluation then.
    const bool due =
        step == options.steps || (options.eval_every > 0 && step % options.eval_every == 0);
    Clock clock;
    if (due && !stopped) {
      try {
        report.eval_loss = trainer.evaluate();
      } catch (const StepAbandoned& error) {
        if (error.reason != StepAbandoned::Reason::stop) {
          throw NotFinite(detail::message("evaluation after step ", step, ": ", error.cause,
                                          " (training diverged): lower --lr, or set --clip-grad"));
        }
        stopped = report.stop = true;
      }
    }
    if (reporter) reporter->add(report, clock.lap());
  }
  if (reporter) reporter->summary(stopped);
}

}  // namespace lshmoe::launch
