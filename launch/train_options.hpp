#pragma once
// The options of lshmoe-train.

#include <cstdint>
#include <string>
#include <vector>

#include "lshmoe/launch/data.hpp"
#include "lshmoe/launch/language_model.hpp"
#include "lshmoe/runtime/error.hpp"
#include "lshmoe/runtime/options.hpp"

namespace lshmoe::launch {

/// As given on the command line and in the INI file; the names are the options' with _ for -.
struct TrainOptions {
  std::vector<std::string> data;
  int64_t vocab_size, seq_len, eval_sequences;

  int64_t layers, hidden_size, heads, dense_ffn_hidden_size;
  std::string dtype;
  std::string device;  ///< as given; what the trainer gets is cpu or cuda, see resolve_device
  std::string comm_backend;
  bool share_gpu, nvtx;

  int64_t num_experts, ffn_hidden_size, top_k, moe_every, shared_expert_size, overlap_degree;
  int64_t num_groups, top_k_groups;
  std::string activation, score_function, drop_policy, aux_loss_scope;
  double capacity_factor, aux_loss_coeff, z_loss_coeff, expert_bias_rate;
  double routed_scaling_factor, logit_noise;
  int64_t ep_size;

  std::string compress, compress_backward, restore, error_reference, error_reference_backward;
  std::string rounding, rounding_backward;
  double max_error, max_error_backward, alpha;
  std::string codec_state, transform;
  int64_t codebook_size, refresh_every, sample_rows, alpha_probes;
  int64_t refine, max_clusters, hashes, hash_dim, projection;
  bool estimate_alpha, codec_on_self, force_basis;

  int64_t steps, batch_size, accumulate, warmup_steps, eval_every, skip_nonfinite, seed;
  double lr, min_lr, weight_decay, clip_grad;

  bool study;
  int64_t study_seeds;
  std::vector<std::string> study_setting;

  std::string metrics, trace;
  int64_t progress;
  double timeout;
};

/// Adds all options, grouped by the folder they belong to. `options` must outlive the parsing.
void add_train_options(OptionParser& parser, TrainOptions& options);

/// Gives `to` the codec (every option of the group "compress") of `from`.
void use_codec_of(const TrainOptions& from, TrainOptions& to);

/// What the options say about text and model.
[[nodiscard]] TextOptions text_options(const TrainOptions& options);
[[nodiscard]] LanguageModelOptions model_options(const TrainOptions& options, int64_t vocab_size);

/// The ep-size meant: 0 stands for the world's size.
[[nodiscard]] int effective_ep_size(const TrainOptions& options, int world_size);

/// Everything that can be checked before anything is built. Throws InvalidArgument, or
/// NotConfigured for what is to come, in one line that names the option. Local.
void validate(const TrainOptions& options, int world_size);

}  // namespace lshmoe::launch
