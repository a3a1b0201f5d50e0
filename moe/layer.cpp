#include "lshmoe/moe/layer.hpp"

#include <memory>
#include <numeric>
#include <unordered_set>

#include "lshmoe/comm/agreement.hpp"
#include "lshmoe/moe/layer_number.hpp"
#include "lshmoe/moe/overlap.hpp"
#include "lshmoe/moe/world_load.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe {
namespace {

GateOptions gate_options(const MoELayerOptions& o) {
  return GateOptions(o.hidden_size(), o.num_experts())
      .top_k(o.top_k())
      .score_function(o.score_function())
      .normalize_top_k(o.normalize_top_k())
      .num_groups(o.num_groups())
      .top_k_groups(o.top_k_groups())
      .routed_scaling_factor(o.routed_scaling_factor())
      .logit_noise(o.logit_noise())
      .capacity_factor(o.capacity_factor())
      .drop_policy(o.drop_policy())
      .aux_loss_coeff(o.aux_loss_coeff())
      .aux_loss_scope(o.aux_loss_scope())
      .z_loss_coeff(o.z_loss_coeff())
      .expert_bias_rate(o.expert_bias_rate())
      .custom_gate(o.custom_gate())
      .layer(o.layer())
      .seed(o.seed());
}

ExpertsOptions experts_options(const MoELayerOptions& o, int64_t ffn_hidden_size, int64_t local,
                               int64_t first) {
  return ExpertsOptions(o.hidden_size(), ffn_hidden_size, local)
      .first_expert(first)
      .activation(o.activation())
      .grouped_gemm(o.grouped_gemm())
      .layer(o.layer())
      .seed(o.seed());
}

}  // namespace

MoELayerOptions& MoELayerOptions::codec(const CodecOptions& c) {
  exchange_.codec(c);
  return *this;
}
MoELayerOptions& MoELayerOptions::codec_dispatch(const CodecOptions& c) {
  exchange_.codec_dispatch(c);
  return *this;
}
MoELayerOptions& MoELayerOptions::codec_combine(const CodecOptions& c) {
  exchange_.codec_combine(c);
  return *this;
}
MoELayerOptions& MoELayerOptions::codec_backward(const CodecOptions& c) {
  exchange_.codec_backward(c);
  return *this;
}
const CodecOptions& MoELayerOptions::codec(Direction direction) const {
  return exchange_.codec(direction);
}
DispatcherOptions MoELayerOptions::dispatcher_options() const {
  DispatcherOptions options = exchange_;
  options.hidden_size(hidden_size_)
      .num_experts(num_experts_)
      .alignment(custom_expert_ ? alignment_ : std::lcm(alignment_, kRowTile))
      .layer(layer_)
      .codec_on_self(codec_on_self_);
  return options;
}

void validate(const MoELayerOptions& o, int ep_size) {
  validate(gate_options(o));
  LSHMOE_VALIDATE(o.ffn_hidden_size() >= 1, "ffn_hidden_size is ", o.ffn_hidden_size(),
                  " (must be at least 1)");
  LSHMOE_VALIDATE(o.shared_expert_size() >= 0, "shared_expert_size is ", o.shared_expert_size(),
                  " (must be 0 for none, or positive)");
  LSHMOE_VALIDATE(o.alignment() >= 1 && o.alignment() <= 1 << 18, "alignment is ", o.alignment(),
                  " (must be 1 to 2^18)");
  LSHMOE_VALIDATE(o.overlap_degree() >= 1 && o.overlap_degree() <= 64, "overlap_degree is ",
                  o.overlap_degree(), " (must be 1 to 64)");
  LSHMOE_VALIDATE(o.overlap_degree() == 1 || !o.custom_expert(), "overlap_degree is ",
                  o.overlap_degree(),
                  ", but the experts are custom ones (only the built-in experts can take their "
                  "weights' gradients after the last chunk): use overlap_degree 1");
  LSHMOE_VALIDATE(o.overlap_degree() == 1 || !sends_centroids(o.codec(Direction::dispatch)),
                  "overlap_degree is ", o.overlap_degree(),
                  ", but restore is source (its clusters span all tokens): use overlap_degree 1");
  validate(o.dispatcher_options(), ep_size);
  validate(experts_options(o, o.ffn_hidden_size(), o.num_experts() / ep_size, 0));
}

MoELayerImpl::MoELayerImpl(MoELayerOptions layer_options, ExpertGroups groups)
    : options(numbered(std::move(layer_options))), groups_(std::move(groups)) {
  validate(options, groups_.expert->size());
  gate = register_module("gate", Gate(gate_options(options)));
  dispatcher_ = std::make_unique<Dispatcher>(options.dispatcher_options(), groups_);
  const int64_t local = dispatcher_->num_local_experts();
  const int64_t first = dispatcher_->first_local_expert();
  if (options.custom_expert()) {
    for (int64_t e = first; e < first + local; ++e) {
      custom_experts_.push_back(options.custom_expert()(e));
      register_module("expert_" + std::to_string(e), custom_experts_.back().ptr());
    }
  } else {
    experts = register_module(
        "experts", Experts(experts_options(options, options.ffn_hidden_size(), local, first)));
  }
  if (options.shared_expert_size() > 0) {
    // Numbered after the experts, so that its weights are nobody else's.
    shared_expert_ = register_module(
        "shared_expert",
        Experts(experts_options(options, options.shared_expert_size(), 1, options.num_experts())));
  }
}

at::Tensor MoELayerImpl::run_experts(const at::Tensor& rows,
                                     const std::vector<int64_t>& rows_per_expert) {
  if (!experts.is_empty()) return experts->forward(rows, rows_per_expert);
  std::vector<at::Tensor> outputs;
  const auto blocks = rows.split_with_sizes(rows_per_expert);
  for (std::size_t e = 0; e < blocks.size(); ++e) {
    outputs.push_back(custom_experts_[e].forward(blocks[e]));
    LSHMOE_VALIDATE(outputs.back().sizes() == blocks[e].sizes(), "custom expert ",
                    dispatcher_->first_local_expert() + static_cast<int64_t>(e), " returned ",
                    outputs.back().sizes(), " for input ", blocks[e].sizes(),
                    " (must have the same shape)");
  }
  return at::cat(outputs);
}

MoEOutput MoELayerImpl::forward(const at::Tensor& x, const RouteInputs& inputs) {
  LSHMOE_VALIDATE(x.dim() >= 2 && x.size(-1) == options.hidden_size(), "the MoE layer's input is ",
                  x.sizes(), " (must be [tokens, ", options.hidden_size(), "] or [batch, seq, ",
                  options.hidden_size(), "])");
  const at::Tensor tokens = x.reshape({-1, options.hidden_size()});
  GateOutput routing = gate->forward(x, inputs);
  const auto timer = std::make_shared<PhaseTimer>();
  MoEOutput out;
  at::Tensor output;
  // The load rides with the dispatch, so that the aux loss waits for nobody; only other expert
  // groups are asked by a message of its own.
  const bool world_load = is_training() && options.aux_loss_coeff() > 0 &&
                          options.aux_loss_scope() == "world" && groups_.world->size() > 1;
  at::Tensor load = world_load ? routing.load : at::Tensor();
  if (options.overlap_degree() > 1) {
    out.stats.exchange = std::make_shared<ExchangeStats>();
    const auto counts = world_load ? counts_to_sum(load) : nullptr;
    output = overlapped_experts(tokens, routing.topk_ids, routing.topk_weights, *experts,
                                options.overlap_degree(), dispatcher_->context(),
                                out.stats.exchange, timer, out.stats.tokens_per_expert, counts);
    if (world_load) load = at::tensor(*counts, at::kLong);
  } else {
    const Dispatched dispatched =
        dispatcher_->dispatch(tokens, routing.topk_ids, routing.topk_weights, load);
    load = dispatched.counts;
    const at::Device device = tokens.device();
    timer->start(device);
    const at::Tensor expert_output = run_experts(dispatched.rows, dispatched.rows_per_expert);
    timer->stop();
    if (expert_output.requires_grad() && dispatched.rows.requires_grad()) {
      expert_output.register_hook([timer, device](const at::Tensor&) { timer->start(device); });
      dispatched.rows.register_hook([timer](const at::Tensor&) { timer->stop(); });
    }
    output = dispatcher_->combine(expert_output, dispatched);
    out.stats.exchange = dispatched.stats;
    out.stats.tokens_per_expert = dispatched.tokens_per_expert;
  }
  if (world_load) {
    if (groups_.replica->size() > 1) {
      go_on_together(*groups_.world);  // another expert group may have given the step up
      load = sum_over(*groups_.replica, load);
    }
    routing.aux_loss = gate->aux_loss(routing, load);
  }
  if (!shared_expert_.is_empty()) {
    // By where, not by a product: a masked row may hold NaN.
    const at::Tensor mask =
        inputs.mask().defined() ? inputs.mask().reshape({-1, 1}).to(x.device()) : at::Tensor();
    const at::Tensor y = shared_expert_->forward(
        mask.defined() ? at::where(mask, tokens, 0) : tokens, {tokens.size(0)});
    output = output + (mask.defined() ? at::where(mask, y, 0) : y);
  }

  out.output = output.view(x.sizes());
  out.aux_loss = routing.aux_loss;
  out.z_loss = routing.z_loss;
  out.stats.load = routing.load;
  out.stats.topk_ids = routing.topk_ids;
  out.stats.dropped = routing.dropped;
  out.stats.expert_time = timer;
  return out;
}

void MoELayerImpl::refresh_codecs() { dispatcher_->refresh_codecs(); }

void MoELayerImpl::update_expert_bias() { gate->update_expert_bias(*groups_.world); }

std::vector<at::Tensor> MoELayerImpl::expert_parameters() const {
  if (!experts.is_empty()) return experts->parameters();
  std::vector<at::Tensor> all;
  for (const auto& module : custom_experts_) {
    for (const at::Tensor& parameter : module.ptr()->parameters()) all.push_back(parameter);
  }
  return all;
}

std::vector<MoELayerImpl*> moe_layers(torch::nn::Module& model) {
  std::vector<MoELayerImpl*> layers;
  std::unordered_set<const MoELayerImpl*> seen;  // a module may be registered twice
  const auto add = [&](torch::nn::Module* module) {
    auto* layer = dynamic_cast<MoELayerImpl*>(module);
    if (layer != nullptr && seen.insert(layer).second) layers.push_back(layer);
  };
  add(&model);  // modules(true) would need a shared_ptr that owns it
  for (const auto& module : model.modules(/*include_self=*/false)) add(module.get());
  return layers;
}

void end_step(torch::nn::Module& model) {
  for (MoELayerImpl* layer : moe_layers(model)) {
    layer->update_expert_bias();
    layer->refresh_codecs();
  }
}

void discard_step(torch::nn::Module& model) {
  for (MoELayerImpl* layer : moe_layers(model)) layer->gate->discard_load();
}

}  // namespace lshmoe
