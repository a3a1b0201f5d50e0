#include "lshmoe/moe/gate.hpp"

#include <ATen/record_function.h>

#include <cmath>
#include <limits>
#include <span>

#include "lshmoe/moe/random.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe {
namespace {

/// How often each of 0 .. experts - 1 is in ids, int64 [experts]. On a GPU too it waits for
/// nothing: bincount would, for the largest id. Sums of integers: no order changes them.
at::Tensor counts_of(const at::Tensor& ids, int64_t experts) {
  if (ids.is_cpu()) return at::bincount(ids, {}, experts);
  return at::zeros({experts}, ids.options()).scatter_add_(0, ids, at::ones_like(ids));
}

/// Which of the choices ids [T, k] fit when an expert takes at most `capacity` of this rank's
/// tokens. `priority` [T, k]: higher stays; undefined: the first token stays. Ties: the first
/// token.
at::Tensor fits_capacity(const at::Tensor& ids, const at::Tensor& priority, int64_t num_experts,
                         int64_t capacity) {
  const at::Tensor flat = ids.reshape({-1});
  at::Tensor order = priority.defined() ? at::argsort(priority.reshape({-1}), /*stable=*/true, 0,
                                                      /*descending=*/true)
                                        : at::arange(flat.numel(), flat.options());
  // Stable: within an expert the order above remains.
  order = order.index_select(0, at::argsort(flat.index_select(0, order), /*stable=*/true, 0));
  const at::Tensor grouped = flat.index_select(0, order);
  const at::Tensor counts = counts_of(grouped, num_experts);
  const at::Tensor starts = counts.cumsum(0) - counts;
  const at::Tensor place =
      at::arange(flat.numel(), flat.options()) - starts.index_select(0, grouped);
  return at::empty_like(place, at::kBool).scatter(0, order, place.lt(capacity)).view_as(ids);
}

}  // namespace

void validate(const GateOptions& o) {
  LSHMOE_VALIDATE(o.hidden_size() >= 1, "hidden_size is ", o.hidden_size(),
                  " (must be at least 1)");
  LSHMOE_VALIDATE(o.num_experts() >= 1, "num_experts is ", o.num_experts(),
                  " (must be at least 1)");
  LSHMOE_VALIDATE(o.top_k() >= 1, "top_k is ", o.top_k(), " (must be at least 1)");
  LSHMOE_VALIDATE(o.top_k() <= o.num_experts(), "top_k ", o.top_k(), " > num_experts ",
                  o.num_experts(),
                  " (a token cannot choose an expert twice): lower top_k or add experts");
  LSHMOE_VALIDATE(o.score_function() == "softmax" || o.score_function() == "sigmoid",
                  "unknown score_function '", o.score_function(), "': use softmax or sigmoid");
  LSHMOE_VALIDATE(o.drop_policy() == "probs" || o.drop_policy() == "position",
                  "unknown drop_policy '", o.drop_policy(), "': use probs or position");
  LSHMOE_VALIDATE(o.capacity_factor() >= 0 && std::isfinite(o.capacity_factor()),
                  "capacity_factor is ", o.capacity_factor(),
                  " (must be positive, or 0 for dropless)");
  LSHMOE_VALIDATE(o.aux_loss_coeff() >= 0 && std::isfinite(o.aux_loss_coeff()),
                  "aux_loss_coeff is ", o.aux_loss_coeff(), " (must be 0 or positive)");
  LSHMOE_VALIDATE(o.z_loss_coeff() >= 0 && std::isfinite(o.z_loss_coeff()), "z_loss_coeff is ",
                  o.z_loss_coeff(), " (must be 0 or positive)");
  LSHMOE_VALIDATE(o.expert_bias_rate() >= 0 && std::isfinite(o.expert_bias_rate()),
                  "expert_bias_rate is ", o.expert_bias_rate(), " (must be 0 or positive)");
  LSHMOE_VALIDATE(o.expert_bias_rate() == 0 || o.score_function() == "sigmoid",
                  "expert_bias_rate is set, but score_function is softmax (only the sigmoid gate "
                  "has an expert bias): use score_function sigmoid");
}

GateImpl::GateImpl(GateOptions gate_options) : options(std::move(gate_options)) {
  validate(options);
  at::Generator stream =
      make_stream({options.seed(), static_cast<uint64_t>(options.layer()), 0, 0});
  weight =
      register_parameter("weight", uniform_fan_in({options.num_experts(), options.hidden_size()},
                                                  options.hidden_size(), stream));
  if (options.score_function() == "sigmoid") {
    expert_bias = register_buffer("expert_bias", at::zeros({options.num_experts()}));
  }
  load_since_update_ = at::zeros({options.num_experts()}, at::kLong);
}

GateOutput GateImpl::forward(const at::Tensor& x) {
  RECORD_FUNCTION("lshmoe::gate", std::vector<c10::IValue>{});
  LSHMOE_VALIDATE(x.dim() == 2 && x.size(1) == options.hidden_size(), "the gate's input is ",
                  x.sizes(), " (must be [tokens, ", options.hidden_size(), "])");
  const int64_t tokens = x.size(0), experts = options.num_experts(), k = options.top_k();
  const at::ScalarType dtype = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor logits = at::linear(x.to(dtype), weight.to(dtype));

  // The choice. A stable sort, because topk leaves the order of ties open.
  const bool softmax = options.score_function() == "softmax";
  const at::Tensor scores = softmax ? at::softmax(logits, -1) : at::sigmoid(logits);
  const at::Tensor chosen_by = softmax ? scores.detach() : scores.detach() + expert_bias.to(dtype);
  at::Tensor ids = std::get<1>(at::sort(chosen_by, /*stable=*/true, -1, /*descending=*/true))
                       .narrow(1, 0, k)
                       .contiguous();
  at::Tensor weights = scores.gather(1, ids);
  if (softmax ? options.normalize_top_k().value_or(k > 1) : true) {
    // Sigmoids may all underflow to 0; they must not become NaN.
    weights =
        weights / weights.sum(1, /*keepdim=*/true).clamp_min(std::numeric_limits<float>::min());
  }

  GateOutput out;
  const at::Tensor counts = counts_of(ids.reshape({-1}), experts);
  out.load = counts;
  if (is_training() && at::GradMode::is_enabled()) {
    load_since_update_ = load_since_update_.to(counts.device()) + counts;
  }

  // Without tokens the losses are 0 but still hang on the graph, as on the other ranks.
  const at::Tensor none = tokens == 0 ? logits.sum() : logits.new_zeros({});
  out.aux_loss = none;
  out.z_loss = none;
  if (options.aux_loss_coeff() > 0 && tokens > 0) {
    const at::Tensor p =
        softmax
            ? scores
            : scores / scores.sum(1, /*keepdim=*/true).clamp_min(std::numeric_limits<float>::min());
    out.aux_loss =
        (counts.to(dtype) * p.mean(0)).sum() *
        (options.aux_loss_coeff() * static_cast<double>(experts) / static_cast<double>(k * tokens));
  }
  if (options.z_loss_coeff() > 0 && tokens > 0) {
    out.z_loss = at::logsumexp(logits, {1}).square().mean() * options.z_loss_coeff();
  }

  if (options.capacity_factor() > 0 && tokens > 0) {
    const double capacity = std::ceil(static_cast<double>(tokens * k) /
                                      static_cast<double>(experts) * options.capacity_factor());
    if (capacity < static_cast<double>(tokens)) {
      const at::Tensor priority =
          options.drop_policy() == "probs" ? scores.detach().gather(1, ids) : at::Tensor();
      const at::Tensor keep = fits_capacity(ids, priority, experts, static_cast<int64_t>(capacity));
      ids = at::where(keep, ids, -1);
      weights = at::where(keep, weights, 0.0);
    }
  }
  out.topk_ids = ids;
  out.topk_weights = weights;
  return out;
}

void GateImpl::update_expert_bias(Communicator& world) {
  if (!expert_bias.defined()) return;
  const at::NoGradGuard no_grad;
  at::Tensor sum = load_since_update_.to(at::kCPU, at::kLong, /*non_blocking=*/false,
                                         /*copy=*/true);
  world.all_reduce(
      std::span(sum.data_ptr<int64_t>(), static_cast<std::size_t>(options.num_experts())),
      ReduceOp::sum, Purpose::control);
  const at::Tensor load = sum.to(at::kDouble);
  expert_bias +=
      options.expert_bias_rate() * at::sign(load.mean() - load).to(expert_bias.options());
  load_since_update_.zero_();
}

}  // namespace lshmoe
