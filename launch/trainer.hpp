#pragma once
// The training loop.

#include <torch/torch.h>

#include <array>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "lshmoe/comm/groups.hpp"
#include "lshmoe/launch/data.hpp"
#include "lshmoe/launch/language_model.hpp"
#include "lshmoe/launch/train_options.hpp"
#include "lshmoe/moe/gradients.hpp"

namespace lshmoe::launch {

/// Linear warm-up to lr over warmup_steps, then a cosine to min_lr at the last step. `step` counts
/// from 1.
[[nodiscard]] double learning_rate(const TrainOptions& options, int64_t step);

/// Wall time by phase, seconds; means over the ranks.
struct PhaseSeconds {
  double experts = 0, codec = 0, alltoall = 0, gradients = 0, optimizer = 0, step = 0;
  double codec_state = 0;  ///< refreshing learned state; part of codec
  PhaseSeconds& operator+=(const PhaseSeconds& other);
};

/// One step, the same on every rank.
struct StepReport {
  int64_t step = 0;
  double loss = 0;  ///< mean over the global batch, nats
  double aux_loss = 0, lr = 0, grad_norm = 0;
  double eval_loss = std::numeric_limits<double>::quiet_NaN();  ///< NaN: not evaluated
  PhaseSeconds seconds;
  double bytes_sent = 0, bytes_raw = 0;  ///< over the world and the four exchanges of all layers
  // What bytes_sent is the sum of:
  std::array<double, 4> codec_bytes{};  ///< parcels, by Direction
  double plan_bytes = 0;                ///< sizes, ids, gate weights and their gradients
  double codec_state_bytes = 0;         ///< learned state, and the samples it is fitted to
  double codec_state_memory = 0;        ///< bytes a rank holds for it, the most of all ranks
  int64_t codec_state_version = 0;      ///< the latest of all codecs; 0: nothing learned yet
  double rows = 0, clusters = 0;        ///< given to the codecs; centroids sent
  double max_relative_error = 0, max_error_ratio = 0;
  double expert_load_max_over_mean = 0;  ///< of the least balanced layer
  /// Of each MoE layer, [num_experts] over the world: tokens that chose the expert; of those,
  /// tokens that its capacity dropped.
  std::vector<std::vector<int64_t>> expert_load, dropped_tokens;
  bool stop = false;  ///< some rank was asked to stop
  /// Given up before its end, because a rank was asked to stop at once. Parameters are as before
  /// it; only `step`, `lr` and `stop` are set.
  bool abandoned = false;
  /// Not empty: the step was skipped because of this, the same text on every rank. Otherwise as
  /// `abandoned`.
  std::string skipped;
};

/// Loss or gradient of a step is NaN or infinite, and no more steps may be skipped. Thrown on every
/// rank alike.
class NotFinite : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A gradient of the whole model, as one rank holds it: flat, fp32.
struct Gradient {
  at::Tensor shared, experts;
};

/// A model, its optimizer, and where they stand. Every member function is collective over the
/// world, if it does not say otherwise.
class Trainer {
 public:
  /// Options as validated, their device as resolve_device sets it; model and optimizer are there.
  /// `data` must outlive the trainer.
  Trainer(const TrainOptions& options, const ExpertGroups& groups, const DataSource& data);

  /// The next optimizer step, over `accumulate` micro-batches. `stop`: this rank was asked to stop.
  /// A loss, gradient or row to send that is not finite skips the step on all ranks; throws
  /// NotFinite on all ranks after more than `skip_nonfinite` such steps in a row.
  [[nodiscard]] StepReport step(bool stop);

  /// Mean loss over the held-out windows, nats; the same windows whatever the layout.
  [[nodiscard]] double evaluate();

  /// The gradient on the batch of `step`, reduced, not clipped. Changes neither parameters nor
  /// learned state. Throws StepAbandoned on all ranks alike, as evaluate() does.
  [[nodiscard]] Gradient gradient(int64_t step);
  /// Over the whole model: shared parameters once, the experts of all ranks of the group.
  [[nodiscard]] double squared_norm(const Gradient& gradient) const;
  /// Takes parameters and buffers of a trainer of the same model and layout. Local.
  void copy_model(const Trainer& from);

  /// See LanguageModelImpl::state_stats. Local.
  [[nodiscard]] std::vector<StateStats> state_stats(Direction direction) const {
    return model_->state_stats(direction);
  }

  /// The model as it trains. Local.
  [[nodiscard]] LanguageModel model() const { return model_; }

  /// Over all ranks; experts counted once.
  [[nodiscard]] int64_t num_parameters();
  [[nodiscard]] int64_t tokens_per_step() const;

 private:
  /// What the micro-batches of a step give together.
  struct Accumulated {
    double loss = 0, aux_loss = 0;             ///< means
    std::vector<std::vector<MoEStats>> stats;  ///< of each micro-batch, of each MoE layer
  };
  /// Forward and backward of the batch of `step`: gradients are added, not yet reduced. Throws
  /// StepAbandoned on all ranks alike.
  Accumulated accumulate(int64_t step);
  /// Throws StepAbandoned on all ranks: names the first parameter whose gradient is not finite.
  void abandon_for_gradient(double norm);
  /// step() but for what happens when it is abandoned; throws StepAbandoned on all ranks alike.
  StepReport whole_step(bool stop);
  bool any_stops(bool stop);

  TrainOptions options_;
  ExpertGroups groups_;
  const DataSource& data_;
  at::Device device_;
  LanguageModel model_;
  GradientReducer reducer_;
  std::unique_ptr<torch::optim::AdamW> optimizer_;
  int64_t step_ = 0;
  int64_t skipped_in_a_row_ = 0;
};

/// Trains to the last step, or until `stop_requested` is true on some rank, with evaluations,
/// metrics and progress lines, and prints the summary on rank 0. Collective.
void train(const TrainOptions& options, const ExpertGroups& groups, const DataSource& data,
           const std::function<bool()>& stop_requested);

}  // namespace lshmoe::launch
