#pragma once
// What a training run tells: metrics, progress lines, the closing summary.

#include <chrono>
#include <cstdint>
#include <memory>

#include "lshmoe/launch/trainer.hpp"
#include "lshmoe/runtime/error.hpp"
#include "lshmoe/runtime/metrics.hpp"

namespace lshmoe::launch {

/// Of rank 0. Local.
class Reporter {
 public:
  /// Says what is trained. Throws InvalidArgument when the metrics file cannot be written.
  Reporter(const TrainOptions& options, const ExpertGroups& groups, const DataSource& data,
           int64_t num_parameters, int64_t tokens_per_step);

  /// Takes in one step: a line of metrics, and every --progress steps a line for the reader.
  void add(const StepReport& report, double eval_seconds);

  /// Prints loss, bytes and time of the whole run to stdout. `stopped`: before the last step.
  void summary(bool stopped) const;

 private:
  void add_skipped(const StepReport& report);

  TrainOptions options_;
  int64_t tokens_per_step_;
  std::unique_ptr<MetricsWriter> metrics_;
  StepReport last_, sum_;
  double loss_since_line_ = 0;
  int64_t steps_since_line_ = 0, whole_steps_ = 0, skipped_ = 0;
  double seconds_since_line_ = 0;
  double eval_loss_, eval_seconds_ = 0;
};

}  // namespace lshmoe::launch
