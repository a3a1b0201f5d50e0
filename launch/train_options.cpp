#include "lshmoe/launch/train_options.hpp"

#include <boost/program_options.hpp>
#include <cmath>
#include <limits>

#include "lshmoe/comm/cuda/device.hpp"
#include "lshmoe/comm/nccl/communicator.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe::launch {
namespace po = boost::program_options;
namespace {

template <class T>
po::typed_value<T>* value(T& variable, const T& default_value) {
  return po::value<T>(&variable)->default_value(default_value);
}
po::typed_value<double>* real(double& variable, double default_value, const char* text) {
  return po::value<double>(&variable)->default_value(default_value, text);
}

constexpr double kAsForward = std::numeric_limits<double>::quiet_NaN();

CodecOptions forward_codec(const TrainOptions& o) {
  return CodecOptions()
      .kind(o.compress)
      .restore(o.restore)
      .max_error(o.max_error)
      .error_reference(o.error_reference)
      .hashes(o.hashes)
      .hash_dim(o.hash_dim)
      .projection(o.projection)
      .refine(o.refine)
      .max_clusters(o.max_clusters)
      .state(o.codec_state)
      .codebook_size(o.codebook_size)
      .transform(o.transform)
      .force_basis(o.force_basis)
      .refresh_every(o.refresh_every)
      .sample_rows(o.sample_rows)
      .alpha(o.alpha)
      .estimate_alpha(o.estimate_alpha)
      .alpha_probes(o.alpha_probes)
      .rounding(o.compress == "none" ? "" : o.rounding)
      .seed(static_cast<std::uint64_t>(o.seed));
}

CodecOptions backward_codec(const TrainOptions& o) {
  CodecOptions codec = forward_codec(o);
  if (!o.compress_backward.empty()) codec.kind(o.compress_backward);
  if (!std::isnan(o.max_error_backward)) codec.max_error(o.max_error_backward);
  const std::string& rounding = o.rounding_backward.empty() ? o.rounding : o.rounding_backward;
  codec.rounding(codec.kind() == "none" ? "" : rounding);
  if (!o.error_reference_backward.empty()) codec.error_reference(o.error_reference_backward);
  return codec;
}

}  // namespace

void add_train_options(OptionParser& parser, TrainOptions& o) {
  using std::string;
  parser.group("Data").add_options()(
      "data", po::value(&o.data)->multitoken()->composing()->value_name("PATH..."),
      "text files or folders, bytes as tokens; or *.bin of token ids with "
      "--vocab-size (default: "
      "the C++ headers of the LibTorch this was built with)")(
      "vocab-size", value<int64_t>(o.vocab_size, 0),
      "number of token ids in *.bin files (uint16; uint32 above 65536); 0: bytes")(
      "seq-len", value<int64_t>(o.seq_len, 128), "tokens a sequence")(
      "eval-sequences", value<int64_t>(o.eval_sequences, 256),
      "held-out sequences of an evaluation, at most");
  parser.group("Model").add_options()("layers", value<int64_t>(o.layers, 2), "transformer blocks")(
      "hidden-size", value<int64_t>(o.hidden_size, 128), "width of the model")(
      "heads", value<int64_t>(o.heads, 4), "attention heads")(
      "dense-ffn-hidden-size", value<int64_t>(o.dense_ffn_hidden_size, 512),
      "width of the feed-forward networks outside the MoE layers")(
      "moe-every", value<int64_t>(o.moe_every, 2), "every n-th block has an MoE layer")(
      "dtype", value<string>(o.dtype, "fp32"),
      "fp32, or bf16: activations in bf16, master weights and router in fp32")(
      "device", value<string>(o.device, "auto"),
      "cpu; cuda: a GPU for each rank of a host; auto: cuda where every rank has one");
  parser.group("Training")
      .add_options()("steps", value<int64_t>(o.steps, 800), "optimizer steps")(
          "batch-size", value<int64_t>(o.batch_size, 4), "sequences a rank and micro-batch")(
          "accumulate", value<int64_t>(o.accumulate, 1),
          "micro-batches a step, whose gradients are averaged before they are reduced")(
          "skip-nonfinite", value<int64_t>(o.skip_nonfinite, 0),
          "steps in a row that may be skipped because a loss, gradient or row to send is not "
          "finite; the next one ends the job")("lr", real(o.lr, 3e-3, "0.003"),
                                               "highest learning rate (AdamW)")(
          "min-lr", real(o.min_lr, 1e-4, "0.0001"), "learning rate at the last step")(
          "warmup-steps", value<int64_t>(o.warmup_steps, 50),
          "steps of linear warm-up, before a cosine to min-lr")(
          "weight-decay", real(o.weight_decay, 0.1, "0.1"), "AdamW's, on matrices only")(
          "clip-grad", real(o.clip_grad, 1.0, "1"),
          "largest L2 norm of the whole model's gradient; 0: no clipping")(
          "eval-every", value<int64_t>(o.eval_every, 200),
          "steps between evaluations on held-out text; 0: only after the last step")(
          "seed", value<int64_t>(o.seed, 0),
          "of parameters, data order and codec, each its own stream");
  parser.group("Study").add_options()(
      "study", po::bool_switch(&o.study),
      "train once for each setting and seed, and compare loss, bytes, time and the "
      "codec's noise; --metrics gets an object a run")(
      "study-seeds", value<int64_t>(o.study_seeds, 3), "seeds: --seed and those after it")(
      "study-setting", po::value(&o.study_setting)->composing()->value_name("OPTIONS"),
      "the codec's options, --capacity-factor and --drop-policy of one setting, in one argument; "
      "they replace a file's; repeatable, the first is the reference (default: 17 settings of "
      "about equal bytes in groups)");
  parser.group_needs({"study"}, " (one model is trained): add --study, or leave it out");
  parser.group("Output").add_options()(
      "metrics", po::value(&o.metrics)->value_name("FILE"),
      "one JSON object a step (rank 0); - or /dev/stdout: all else goes to standard error")(
      "trace", po::value(&o.trace)->value_name("FILE"),
      "a trace per rank for the Perfetto UI (t.json: t.rank0.json, ...); for runs of few steps")(
      "nvtx", po::bool_switch(&o.nvtx), "mark the trace's ranges for Nsight, instead of --trace")(
      "progress", value<int64_t>(o.progress, 20), "steps between progress lines; 0: none");
  parser.group("Ranks").add_options()("ep-size", value<int64_t>(o.ep_size, 0),
                                      "ranks that share the experts; 0: all ranks")(
      "timeout", real(o.timeout, 300, "300"), "longest wait for other ranks, seconds")(
      "comm-backend", value<string>(o.comm_backend, "auto"),
      "what moves rows and gradients of GPUs: nccl, or mpi (through host memory); auto: nccl where "
      "this was built with it and no GPU is shared")(
      "share-gpu", po::bool_switch(&o.share_gpu),
      "ranks of a host may take the same GPU (for tests); with mpi only");
  parser.group("MoE layers")
      .add_options()("num-experts", value<int64_t>(o.num_experts, 8),
                     "experts of an MoE layer, over all ranks of an ep group")(
          "ffn-hidden-size", value<int64_t>(o.ffn_hidden_size, 256), "width of an expert")(
          "top-k", value<int64_t>(o.top_k, 2), "experts a token")(
          "activation", value<string>(o.activation, "gelu"),
          "of the experts: gelu, relu or swiglu")(
          "shared-expert-size", value<int64_t>(o.shared_expert_size, 0),
          "width of an expert that every token passes; 0: none")(
          "overlap-degree", value<int64_t>(o.overlap_degree, 1),
          "chunks of tokens, so that exchanges run beside experts (on a GPU)")(
          "score-function", value<string>(o.score_function, "softmax"), "softmax or sigmoid")(
          "num-groups", value<int64_t>(o.num_groups, 1),
          "groups of experts, chosen before experts")("top-k-groups",
                                                      value<int64_t>(o.top_k_groups, 1),
                                                      "groups a token chooses its experts from")(
          "routed-scaling-factor", real(o.routed_scaling_factor, 1, "1"),
          "of the gate weights, after they were normalized")(
          "logit-noise", real(o.logit_noise, 0, "0"),
          "deviation of the Gaussian noise on the router's logits in training; 0: none")(
          "capacity-factor", real(o.capacity_factor, 0, "0"),
          "most tokens a rank may send to one expert, as a multiple of an even share; 0: no limit "
          "(dropless)")("drop-policy", value<string>(o.drop_policy, "probs"),
                        "who stays when an expert is full: probs or position")(
          "aux-loss-coeff", real(o.aux_loss_coeff, 0.01, "0.01"), "load-balancing loss")(
          "aux-loss-scope", value<string>(o.aux_loss_scope, "world"),
          "whose load it counts: of all ranks' tokens (world), a rank's, or each sequence's")(
          "z-loss-coeff", real(o.z_loss_coeff, 0, "0"), "router z-loss")(
          "expert-bias-rate", real(o.expert_bias_rate, 0, "0"),
          "sigmoid: how far an expert's bias moves against its load in each step; 0: not at all");
  parser.group("Compression")
      .add_options()(
          "compress", value<string>(o.compress, "none"),
          "what travels: none, bf16, fp8, int8, int4 or lsh; the options below are refused "
          "without it (with none they rest)")(
          "restore", value<string>(o.restore, "expert"),
          "lsh: every token restored at its expert, or (source) centroids only, as in the paper")(
          "max-error", real(o.max_error, 0.1, "0.1"),
          "lsh, restore=expert: bound on the L2 error of every row; 0: bit-exact")(
          "max-error-backward", real(o.max_error_backward, kAsForward, "as forward"),
          "--max-error of the two backward exchanges")(
          "compress-backward", value<string>(o.compress_backward, ""),
          "--compress of the two backward exchanges; default: as forward")(
          "error-reference", value<string>(o.error_reference, ""),
          "bound relative to the row's norm (row) or the group's rms norm (group), norms cut off "
          "at "
          "three medians; default: row for dispatch, group for the others")(
          "error-reference-backward", value<string>(o.error_reference_backward, ""),
          "--error-reference of the two backward exchanges; default: as forward")(
          "hashes", value<int64_t>(o.hashes, 3), "cross-polytope hashes a row")(
          "hash-dim", value<int64_t>(o.hash_dim, 8), "dimension of each hash")(
          "projection", value<int64_t>(o.projection, 64), "columns of the random projection")(
          "refine", value<int64_t>(o.refine, 1), "nearest-centroid passes after the hashing")(
          "max-clusters", value<int64_t>(o.max_clusters, 128),
          "most centroids a group of rows may send; 0: none")(
          "codec-state", value<string>(o.codec_state, "batch"),
          "batch: parcels explain themselves; learned: a codebook that both ends know")(
          "codebook-size", value<int64_t>(o.codebook_size, 1024), "learned: centroids at most")(
          "transform", value<string>(o.transform, "channels"),
          "of residuals: channels (ordered by energy), or basis (learned only)")(
          "force-basis", po::bool_switch(&o.force_basis),
          "transform=basis: also above hidden-size 2048, where it is refused")(
          "refresh-every", value<int64_t>(o.refresh_every, 100),
          "learned: steps between fits, after those at steps 1, 2, 4, ...")(
          "sample-rows", value<int64_t>(o.sample_rows, 0),
          "learned: rows a fit sees; 0: 2048, with a basis at least 10 x "
          "hidden-size, but no more than a 32nd of the rows until the next fit")(
          "alpha", real(o.alpha, 0, "0"), "restore=source: weight of the residual; 1 is the paper")(
          "estimate-alpha", po::bool_switch(&o.estimate_alpha),
          "restore=source: estimate alpha from probe tokens, for each expert and forward")(
          "alpha-probes", value<int64_t>(o.alpha_probes, 4),
          "estimate-alpha: tokens sent whole for it, at most, a rank and expert")(
          "rounding", value<string>(o.rounding, ""),
          "nearest, or without bias: stochastic (fp8, int8, int4), dithered (lsh); default: "
          "nearest, and dithered for lsh's backward exchanges")(
          "rounding-backward", value<string>(o.rounding_backward, ""),
          "--rounding of the two backward exchanges; default: as forward")(
          "codec-on-self", po::bool_switch(&o.codec_on_self),
          "rows for the own rank pass the codec too");
  // With --study the settings say what is compressed, and what a file says of it rests.
  parser.group_needs({"compress", "compress-backward", "study"},
                     " (nothing is compressed): add --compress lsh, or --compress none if that is "
                     "meant, or leave it out");
}

void use_codec_of(const TrainOptions& from, TrainOptions& to) {
  to.compress = from.compress;
  to.compress_backward = from.compress_backward;
  to.restore = from.restore;
  to.error_reference = from.error_reference;
  to.error_reference_backward = from.error_reference_backward;
  to.rounding = from.rounding;
  to.rounding_backward = from.rounding_backward;
  to.max_error = from.max_error;
  to.max_error_backward = from.max_error_backward;
  to.alpha = from.alpha;
  to.codec_state = from.codec_state;
  to.transform = from.transform;
  to.force_basis = from.force_basis;
  to.codebook_size = from.codebook_size;
  to.refresh_every = from.refresh_every;
  to.sample_rows = from.sample_rows;
  to.alpha_probes = from.alpha_probes;
  to.refine = from.refine;
  to.max_clusters = from.max_clusters;
  to.hashes = from.hashes;
  to.hash_dim = from.hash_dim;
  to.projection = from.projection;
  to.estimate_alpha = from.estimate_alpha;
  to.codec_on_self = from.codec_on_self;
}

TextOptions text_options(const TrainOptions& o) {
  TextOptions text;
  text.paths = o.data;
  text.vocab_size = o.vocab_size;
  text.seq_len = o.seq_len;
  text.eval_sequences = o.eval_sequences;
  text.seed = static_cast<std::uint64_t>(o.seed);
  return text;
}

LanguageModelOptions model_options(const TrainOptions& o, int64_t vocab_size) {
  MoELayerOptions moe(o.hidden_size, o.ffn_hidden_size, o.num_experts);
  moe.top_k(o.top_k)
      .activation(o.activation)
      .score_function(o.score_function)
      .num_groups(o.num_groups)
      .top_k_groups(o.top_k_groups)
      .routed_scaling_factor(o.routed_scaling_factor)
      .logit_noise(o.logit_noise)
      .capacity_factor(o.capacity_factor)
      .drop_policy(o.drop_policy)
      .aux_loss_coeff(o.aux_loss_coeff)
      .aux_loss_scope(o.aux_loss_scope)
      .z_loss_coeff(o.z_loss_coeff)
      .expert_bias_rate(o.expert_bias_rate)
      .shared_expert_size(o.shared_expert_size)
      .codec_on_self(o.codec_on_self)
      .overlap_degree(o.overlap_degree)
      .codec(forward_codec(o));
  if (!o.compress_backward.empty() || !std::isnan(o.max_error_backward) ||
      !o.rounding_backward.empty() || !o.error_reference_backward.empty()) {
    moe.codec_backward(backward_codec(o));
  }
  return LanguageModelOptions(vocab_size, moe)
      .layers(o.layers)
      .heads(o.heads)
      .dense_ffn_hidden_size(o.dense_ffn_hidden_size)
      .moe_every(o.moe_every)
      .dtype(o.dtype == "bf16" ? at::kBFloat16 : at::kFloat)
      .seed(static_cast<std::uint64_t>(o.seed));
}

int effective_ep_size(const TrainOptions& o, int world_size) {
  return o.ep_size == 0 ? world_size : static_cast<int>(o.ep_size);
}

void validate(const TrainOptions& o, int world_size) {
  LSHMOE_VALIDATE(o.device == "auto" || o.device == "cpu" || o.device == "cuda", "unknown device '",
                  o.device, "': use --device auto, cpu or cuda");
  LSHMOE_VALIDATE(o.comm_backend == "auto" || o.comm_backend == "mpi" || o.comm_backend == "nccl",
                  "unknown comm-backend '", o.comm_backend,
                  "': use --comm-backend auto, mpi or nccl");
  LSHMOE_VALIDATE(o.device != "cpu" || (!o.share_gpu && o.comm_backend != "nccl"),
                  o.share_gpu ? "share-gpu" : "comm-backend nccl",
                  " is for GPUs, but device is cpu: use --device cuda, or leave it out");
  LSHMOE_VALIDATE(!o.share_gpu || o.comm_backend != "nccl",
                  "share-gpu with comm-backend nccl (NCCL refuses two ranks on one GPU): use "
                  "--comm-backend mpi, or a GPU for each rank");
  LSHMOE_VALIDATE(!o.nvtx || o.trace.empty(),
                  "nvtx and trace exclude each other (both take torch's profiler): give one of "
                  "them");
  if (o.device == "cuda" && !cuda::configured()) {
    throw NotConfigured(
        "device cuda (this lshmoe was built without CUDA): rebuild with -DLSHMOE_CUDA=ON, or use "
        "--device cpu");
  }
  if (o.comm_backend == "nccl" && !nccl_configured()) {
    throw NotConfigured(
        "comm-backend nccl (this lshmoe was built without NCCL): rebuild with -DLSHMOE_CUDA=ON "
        "where NCCL is found, or use --comm-backend mpi");
  }
  LSHMOE_VALIDATE(o.dtype == "fp32" || o.dtype == "bf16", "unknown dtype '", o.dtype,
                  "': use --dtype fp32 or bf16");
  check_at_least("steps", o.steps, 1);
  check_at_least("batch-size", o.batch_size, 1);
  check_at_least("accumulate", o.accumulate, 1);
  check_at_least("skip-nonfinite", o.skip_nonfinite, 0);
  check_at_least("seq-len", o.seq_len, 1);
  // A step's tokens are counted in many places, and int64 and memory end; no run comes near it.
  constexpr int64_t kMostTokens = int64_t{1} << 31;
  LSHMOE_VALIDATE(o.seq_len < kMostTokens && o.batch_size <= kMostTokens / o.seq_len, "batch-size ",
                  o.batch_size, " with seq-len ", o.seq_len,
                  " is too many tokens for a rank and step (at most ", kMostTokens,
                  "): lower one of them");
  LSHMOE_VALIDATE(o.accumulate <= kMostTokens, "accumulate is ", o.accumulate, " (at most ",
                  kMostTokens, " micro-batches): lower it");
  check_at_least("warmup-steps", o.warmup_steps, 0);
  check_at_least("eval-every", o.eval_every, 0);
  check_at_least("progress", o.progress, 0);
  check_at_least("seed", o.seed, 0);
  check_at_least("weight-decay", o.weight_decay, 0);
  check_at_least("clip-grad", o.clip_grad, 0);
  check_at_least("min-lr", o.min_lr, 0);
  LSHMOE_VALIDATE(std::isfinite(o.lr) && o.lr > 0 && o.lr >= o.min_lr, "lr is ", o.lr,
                  " (must be above 0 and not below min-lr, ", o.min_lr, "): change one of them");
  LSHMOE_VALIDATE(std::isfinite(o.timeout) && o.timeout > 0, "timeout is ", o.timeout,
                  " (seconds, must be above 0)");
  LSHMOE_VALIDATE(o.ep_size >= 0 && o.ep_size <= world_size &&
                      world_size % effective_ep_size(o, world_size) == 0,
                  "ep-size ", o.ep_size, " does not divide the number of ranks of the job, ",
                  world_size,
                  " (every group of ep-size ranks holds all experts): change "
                  "--ep-size or the number of ranks");
  const bool lsh = o.compress == "lsh" || o.compress_backward == "lsh";
  // A file's options of a codec may stay where --compress none switches it off.
  const bool off =
      o.compress == "none" && (o.compress_backward.empty() || o.compress_backward == "none");
  const std::string lsh_only = o.restore != "expert"      ? "restore " + o.restore
                               : o.codec_state != "batch" ? "codec-state " + o.codec_state
                                                          : "";
  LSHMOE_VALIDATE(lsh || off || lsh_only.empty(), lsh_only, " is for --compress lsh, it is ",
                  o.compress, " (nothing would be clustered): add --compress lsh, or leave it out");
  LSHMOE_VALIDATE(std::isnan(o.max_error_backward) || o.max_error_backward >= 0,
                  "max-error-backward is ", o.max_error_backward, " (must be 0 or positive)");
  validate(forward_codec(o));
  validate(backward_codec(o));
  validate(model_options(o, 2), effective_ep_size(o, world_size));
}

}  // namespace lshmoe::launch
