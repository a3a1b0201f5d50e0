#pragma once
// Dispatcher: brings tokens to their experts' ranks and the results back, compressed.
//
// It is the heart of the layer and usable without it: own gate, own experts.

#include <torch/torch.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "lshmoe/comm/groups.hpp"
#include "lshmoe/compress/codec.hpp"
#include "lshmoe/moe/phase_timer.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe {

class ExchangeContext;

/// What one direction of one forward (and its backward) sent from this rank.
struct DirectionStats {
  int64_t rows = 0;  ///< rows given to the codec (rows for other ranks; all with codec_on_self)
  int64_t clusters = 0;
  int64_t whole_rows = 0;
  int64_t bytes_raw = 0;            ///< 2 * elements of the rows the plan sends to other ranks
  int64_t codec_bytes = 0;          ///< parcels sent to other ranks
  int64_t plan_bytes = 0;           ///< sizes, ids, weights, gate gradients sent to other ranks
  double max_relative_error = 0.0;  ///< see CodecStats
  double mean_relative_error = 0.0;
  double max_error_ratio = 0.0;
  PhaseTimer codec_time;     ///< encode + decode
  PhaseTimer exchange_time;  ///< inside the communicator
};

/// Statistics of one forward; the backward adds its directions when it runs, so read them after it.
struct ExchangeStats {
  DirectionStats direction[4];  ///< indexed by Direction
  int64_t forward =
      0;  ///< number of this forward among its Dispatcher's, from 1; same on all ranks
  /// restore=source with estimate_alpha: [num_experts], as estimated by this rank; else empty.
  std::vector<double> alpha;
  [[nodiscard]] DirectionStats& operator[](Direction d) { return direction[static_cast<int>(d)]; }
  [[nodiscard]] const DirectionStats& operator[](Direction d) const {
    return direction[static_cast<int>(d)];
  }
};

struct DispatcherOptions {
  DispatcherOptions(int64_t hidden_size, int64_t num_experts)
      : hidden_size_(hidden_size), num_experts_(num_experts) {}
  TORCH_ARG(int64_t, hidden_size);
  /// Global; each rank of the expert group holds num_experts / ep_size of them, a contiguous block.
  TORCH_ARG(int64_t, num_experts);
  /// Each expert's block of rows is padded with zero rows to a multiple of this.
  TORCH_ARG(int64_t, alignment) = 1;
  /// Number of this layer in the model: separates the codecs' random streams. Unset: one of its
  /// own, drawn when it is made; see layer_number(). A number may repeat: apart from it each
  /// Dispatcher is known by its place among those made on its group, so every rank must make and
  /// call them in the same order.
  TORCH_ARG(std::optional<int64_t>, layer) = std::nullopt;
  /// Rows for the own rank pass the codec too (study; bit-equality across layouts).
  TORCH_ARG(bool, codec_on_self) = false;

 public:
  /// Sets all four exchanges; unset: kind none. With restore=source the other three carry raw rows.
  DispatcherOptions& codec(const CodecOptions& c);
  /// Overrides for one exchange.
  DispatcherOptions& codec_dispatch(const CodecOptions& c);
  DispatcherOptions& codec_combine(const CodecOptions& c);
  /// Both backward exchanges.
  DispatcherOptions& codec_backward(const CodecOptions& c);
  [[nodiscard]] const CodecOptions& codec(Direction direction) const;

 private:
  CodecOptions codecs_[4] = {CodecOptions().kind("none"), CodecOptions().kind("none"),
                             CodecOptions().kind("none"), CodecOptions().kind("none")};
};

/// Throws InvalidArgument: sizes < 1, num_experts not divisible by ep_size, bad codec options.
void validate(const DispatcherOptions& options, int ep_size);

/// Result of dispatch(): the rows of this rank's experts, and what combine() needs to go back.
struct Dispatched {
  /// [rows, hidden_size], x's dtype, expert-major: block e holds the rows of local expert e (in
  /// (source rank, token) order), padded with zeros to `alignment`. restore=source: the centroids.
  at::Tensor rows;
  /// [rows] fp32 (fp64 where x is): gate weight of each row; 0 in padding. Differentiable.
  at::Tensor row_weights;
  std::vector<int64_t> tokens_per_expert;  ///< [num_local_experts], host, without padding
  std::vector<int64_t> rows_per_expert;    ///< [num_local_experts], host, with padding
  at::Tensor counts;  ///< int64 [n] on the CPU: the group's sums of those given; else undefined
  std::shared_ptr<ExchangeStats> stats;
  std::vector<at::Tensor> plan;  ///< opaque: tensors that describe the way back
};

/// Thread-safe: where the expert group has one rank, threads may dispatch and combine beside each
/// other. In a group of several ranks a thread that comes while another is in a collective is
/// refused (InvalidArgument, see Communicator).
class Dispatcher {
 public:
  /// Copies the groups' pointers. Local. Throws InvalidArgument.
  Dispatcher(DispatcherOptions options, const ExpertGroups& groups);
  ~Dispatcher();
  /// Another one with the same settings is made from options().
  Dispatcher(const Dispatcher&) = delete;
  Dispatcher& operator=(const Dispatcher&) = delete;

  /// Sends each token once to each rank that holds one of its experts. Collective over
  /// groups.expert, and so is its backward; differentiable in x and topk_weights.
  /// x [tokens, hidden_size] float32 | bfloat16 | float64 (codec none); tokens may differ per rank,
  /// or be 0. topk_ids int64 [tokens, k], -1 = dropped; topk_weights [tokens, k] fp32 (fp64 where x
  /// is). Throws InvalidArgument on ids out of range or repeated in a token, wrong shapes or
  /// dtypes.
  /// Rows with NaN or infinity: kinds none and bf16 pass them on; the other kinds have no code for
  /// them, and all ranks of the group throw StepAbandoned (runtime/abandon.hpp), in the backward
  /// too. Rows for the own rank meet no codec unless codec_on_self is set, so a NaN that passes at
  /// ep_size 1 may end the step at ep_size 2.
  /// On a GPU: x and topk_weights are there, topk_ids too or on the CPU; ids and weights are copied
  /// to the host, once, to make the plan. Rows and weights are made on the current stream.
  /// counts int64 [n], 0 .. 2^31 - 1, on any device, n equal on all ranks: summed over the group in
  /// the message of the rows, 4 n bytes to each rank and no wait of its own.
  [[nodiscard]] Dispatched dispatch(const at::Tensor& x, const at::Tensor& topk_ids,
                                    const at::Tensor& topk_weights,
                                    const at::Tensor& counts = {}) const;

  /// Multiplies by the gate weights, sums each token's experts in fp32, brings the sums back.
  /// expert_output [rows, hidden_size] in the order of dispatched.rows. Returns [tokens,
  /// hidden_size] in expert_output's dtype. Collective over groups.expert, backward too;
  /// differentiable in expert_output, weights and (restore=source) x.
  [[nodiscard]] at::Tensor combine(const at::Tensor& expert_output,
                                   const Dispatched& dispatched) const;

  /// state=learned: fits the codecs anew to what this training step sent, where that is due (see
  /// Codec::refresh). Call it once an optimizer step, after the backward. Collective over
  /// groups.expert; without a learned state nothing happens.
  void refresh_codecs() const;
  /// The learned state of one exchange: version, bytes, memory and seconds so far. Local.
  [[nodiscard]] StateStats state_stats(Direction direction) const;

  [[nodiscard]] const DispatcherOptions& options() const;
  [[nodiscard]] int64_t num_local_experts() const;
  /// Global index of this rank's first expert.
  [[nodiscard]] int64_t first_local_expert() const;
  /// What its forwards share; see exchange.hpp.
  [[nodiscard]] const std::shared_ptr<ExchangeContext>& context() const;

 private:
  struct Impl;
  std::shared_ptr<Impl> impl_;
};

}  // namespace lshmoe
