#include "lshmoe/moe/gate.hpp"

#include <ATen/record_function.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "lshmoe/moe/check_sizes.hpp"
#include "lshmoe/moe/layer_number.hpp"
#include "lshmoe/moe/random.hpp"
#include "lshmoe/moe/world_load.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe {
namespace {

/// How often each of 0 .. experts - 1 is in ids, int64 [experts]; -1 counts nowhere. On a GPU too
/// it waits for nothing: bincount would, for the largest id. Sums of integers: no order changes
/// them.
at::Tensor counts_of(const at::Tensor& ids, int64_t experts) {
  const at::Tensor from_one = ids.reshape({-1}) + 1;
  const at::Tensor counts = from_one.is_cpu()
                                ? at::bincount(from_one, {}, experts + 1)
                                : at::zeros({experts + 1}, from_one.options())
                                      .scatter_add_(0, from_one, at::ones_like(from_one));
  return counts.narrow(0, 1, experts);
}

/// The k best of each row of scores [rows, n], best first, ties to the lowest index; int64 [rows,
/// k].
at::Tensor best_of(const at::Tensor& scores, int64_t k) {
  // A stable sort, because topk leaves the order of ties open.
  return std::get<1>(at::sort(scores, /*stable=*/true, -1, /*descending=*/true))
      .narrow(1, 0, k)
      .contiguous();
}

/// scores [rows, experts] with -infinity in place of those outside of the best groups.
/// `logarithms`: the scores are logarithms (plus a constant) of what is summed.
at::Tensor in_best_groups(const at::Tensor& scores, const GateOptions& o, bool logarithms) {
  const int64_t rows = scores.size(0), size = o.num_experts() / o.num_groups();
  const at::Tensor grouped = scores.view({rows, o.num_groups(), size});
  const at::Tensor two = std::get<0>(at::topk(grouped, std::min<int64_t>(2, size), -1));
  const at::Tensor groups =
      best_of(logarithms ? at::logsumexp(two, {-1}) : two.sum(-1), o.top_k_groups());
  const at::Tensor out =
      at::ones({rows, o.num_groups()}, scores.options().dtype(at::kBool)).scatter(1, groups, false);
  return grouped.masked_fill(out.unsqueeze(2), -std::numeric_limits<double>::infinity())
      .view_as(scores);
}

/// Gaussian noise of logits' sizes. Its stream is named by the logits' bits (see GateOptions).
at::Tensor noise_for(const at::Tensor& logits, const GateOptions& o) {
  const at::Tensor bits =
      logits.detach().contiguous().view(logits.scalar_type() == at::kDouble ? at::kLong : at::kInt);
  // Sums of integers that wrap around, weighted by place: no order of summing changes them.
  const at::Tensor place = at::arange(bits.numel(), bits.options().dtype(at::kLong));
  const auto name = (bits.reshape({-1}).to(at::kLong) * (2 * place + 1)).sum().item<int64_t>();
  at::Generator stream =
      make_stream({o.seed(), static_cast<uint64_t>(*o.layer()), 2, static_cast<uint64_t>(name)});
  return at::randn(logits.sizes(), stream, logits.options().device(at::kCPU)).to(logits.device());
}

/// ceil(tokens * k / experts * factor) of the factor as it was written: the double beside 1.1 is a
/// hair larger, so where a product is within its rounding error of an integer, it is that integer.
int64_t capacity_of(int64_t tokens, const GateOptions& o) {
  const double product = static_cast<double>(tokens * o.top_k()) /
                         static_cast<double>(o.num_experts()) * o.capacity_factor();
  if (product >= static_cast<double>(tokens)) return tokens;
  const double nearest = std::round(product);
  const bool integer =
      std::abs(product - nearest) <= 2 * std::numeric_limits<double>::epsilon() * product;
  return static_cast<int64_t>(integer ? nearest : std::ceil(product));
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

void check_inputs(const at::Tensor& x, const RouteInputs& inputs, const GateOptions& o) {
  LSHMOE_VALIDATE(x.dim() >= 2 && x.size(-1) == o.hidden_size(), "the gate's input is ", x.sizes(),
                  " (must be [tokens, ", o.hidden_size(), "] or [batch, seq, ", o.hidden_size(),
                  "])");
  const auto of_tokens = x.sizes().slice(0, static_cast<std::size_t>(x.dim()) - 1);
  const int64_t tokens = x.numel() / o.hidden_size();
  const at::Tensor& mask = inputs.mask();
  LSHMOE_VALIDATE(!mask.defined() || mask.scalar_type() == at::kBool, "the mask's dtype is ",
                  mask.scalar_type(),
                  " (must be bool, true where a token takes part; ids to replay are int64)");
  LSHMOE_VALIDATE(
      !mask.defined() || mask.sizes() == of_tokens || mask.sizes() == at::IntArrayRef(tokens),
      "the mask is ", mask.sizes(), " for input ", x.sizes(),
      " (must be [tokens] or [batch, seq])");
  const at::Tensor& ids = inputs.topk_ids();
  if (!ids.defined()) return;
  LSHMOE_VALIDATE(ids.scalar_type() == at::kLong && ids.dim() >= 2 && ids.size(-1) == o.top_k() &&
                      ids.numel() == tokens * o.top_k(),
                  "topk_ids are ", ids.scalar_type(), " ", ids.sizes(), " for input ", x.sizes(),
                  " (must be int64 [tokens, ", o.top_k(), "] or [batch, seq, ", o.top_k(), "])");
  LSHMOE_VALIDATE(!o.custom_gate(),
                  "topk_ids are given, but the gate is a custom one (only the built-in gate can "
                  "weigh them): leave them out, or let the custom gate return them");
}

/// Throws where ids [rows, k] are no choices: out of range, or an expert twice in a row.
void check_ids(const at::Tensor& ids, int64_t experts) {
  if (ids.numel() == 0) return;
  const at::Tensor host = ids.cpu();
  const auto [least, most] = at::aminmax(host);
  LSHMOE_VALIDATE(least.item<int64_t>() >= -1 && most.item<int64_t>() < experts, "topk_ids hold ",
                  least.item<int64_t>(), " to ", most.item<int64_t>(), " (must be 0 to ",
                  experts - 1, ", or -1 for none)");
  const at::Tensor sorted = std::get<0>(at::sort(host, 1));
  const int64_t k = host.size(1);
  const at::Tensor twice = sorted.narrow(1, 1, k - 1)
                               .eq(sorted.narrow(1, 0, k - 1))
                               .logical_and(sorted.narrow(1, 1, k - 1).ge(0));
  LSHMOE_VALIDATE(!twice.any().item<bool>(),
                  "topk_ids name an expert twice in a token (its row "
                  "would be weighed twice): give each expert once, and -1 for none");
}

}  // namespace

/// The tokens of a forward, and which of them take part.
struct GateImpl::Tokens {
  int64_t sequences, length;  ///< their product is the number of tokens
  at::Tensor part;            ///< int64: indices of those that take part; undefined: all do

  Tokens(const at::Tensor& x, const at::Tensor& mask)
      : sequences(c10::multiply_integers(x.sizes().begin(), x.sizes().end() - 2)),
        length(x.size(-2)) {
    if (mask.defined()) part = mask.reshape({-1}).to(x.device()).nonzero().squeeze(1);
  }
  /// The rows of `all` [tokens, n] that take part.
  [[nodiscard]] at::Tensor select(const at::Tensor& all) const {
    return part.defined() ? all.index_select(0, part) : all;
  }
  /// `rows` of those that take part, back in their places; `filler` elsewhere.
  [[nodiscard]] at::Tensor spread(const at::Tensor& rows, const at::Scalar& filler) const {
    if (!part.defined()) return rows;
    return at::full({sequences * length, rows.size(1)}, filler, rows.options())
        .index_copy(0, part, rows);
  }
};

void validate(const GateOptions& o) {
  validate_layer_number(o.layer());
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
  LSHMOE_VALIDATE(o.num_groups() >= 1 && o.num_experts() % o.num_groups() == 0, "num_groups is ",
                  o.num_groups(), " (must be at least 1, and divide num_experts ", o.num_experts(),
                  ")");
  LSHMOE_VALIDATE(o.top_k_groups() >= 1 && o.top_k_groups() <= o.num_groups(), "top_k_groups is ",
                  o.top_k_groups(), " (must be 1 to num_groups, ", o.num_groups(), ")");
  const int64_t in_groups = o.num_experts() / o.num_groups() * o.top_k_groups();
  LSHMOE_VALIDATE(o.top_k() <= in_groups, "top_k ", o.top_k(), " > the ", in_groups,
                  " experts of top_k_groups ", o.top_k_groups(),
                  " groups (a token chooses inside its groups): raise top_k_groups or lower top_k");
  LSHMOE_VALIDATE(o.routed_scaling_factor() > 0 && std::isfinite(o.routed_scaling_factor()),
                  "routed_scaling_factor is ", o.routed_scaling_factor(), " (must be above 0)");
  LSHMOE_VALIDATE(o.logit_noise() >= 0 && std::isfinite(o.logit_noise()), "logit_noise is ",
                  o.logit_noise(), " (must be 0 for none, or positive)");
  LSHMOE_VALIDATE(o.aux_loss_scope() == "world" || o.aux_loss_scope() == "rank" ||
                      o.aux_loss_scope() == "sequence",
                  "unknown aux_loss_scope '", o.aux_loss_scope(), "': use world, rank or sequence");
  if (!o.custom_gate()) return;
  const auto built_in_only = [](const char* option, bool set) {
    LSHMOE_VALIDATE(!set, option,
                    " is set, but the gate is a custom one (only the built-in gate does that): "
                    "leave it out, and let the custom gate do it");
  };
  built_in_only("score_function sigmoid", o.score_function() == "sigmoid");
  built_in_only("normalize_top_k", o.normalize_top_k().has_value());
  built_in_only("num_groups", o.num_groups() > 1);
  built_in_only("routed_scaling_factor", o.routed_scaling_factor() != 1);
  built_in_only("logit_noise", o.logit_noise() > 0);
  built_in_only("capacity_factor", o.capacity_factor() > 0);
  built_in_only("aux_loss_coeff", o.aux_loss_coeff() > 0);
  built_in_only("z_loss_coeff", o.z_loss_coeff() > 0);
}

GateImpl::GateImpl(GateOptions gate_options) : options(numbered(std::move(gate_options))) {
  validate(options);
  load_since_update_ = at::zeros({options.num_experts()}, at::kLong);
  if (options.custom_gate()) {
    custom_ = options.custom_gate()();
    register_module("custom", custom_.ptr());
    return;
  }
  at::Generator stream =
      make_stream({options.seed(), static_cast<uint64_t>(*options.layer()), 0, 0});
  weight =
      register_parameter("weight", uniform_fan_in({options.num_experts(), options.hidden_size()},
                                                  options.hidden_size(), stream));
  if (options.score_function() == "sigmoid") {
    expert_bias = register_buffer("expert_bias", at::zeros({options.num_experts()}));
  }
}

at::ScalarType GateImpl::kept_dtype(at::ScalarType dtype) const {
  if (!custom_.is_empty()) return dtype;
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}
void GateImpl::to(torch::Device device, torch::Dtype dtype, bool non_blocking) {
  Module::to(device, kept_dtype(dtype), non_blocking);
}
void GateImpl::to(torch::Dtype dtype, bool non_blocking) {
  Module::to(kept_dtype(dtype), non_blocking);
}

GateOutput GateImpl::forward(const at::Tensor& x, const RouteInputs& inputs) {
  RECORD_FUNCTION("lshmoe::gate", std::vector<c10::IValue>{});
  check_inputs(x, inputs, options);
  const Tokens tokens(x, inputs.mask());
  const at::Tensor rows = tokens.select(x.reshape({-1, options.hidden_size()}));
  at::Tensor given_ids;
  if (inputs.topk_ids().defined()) {
    given_ids = inputs.topk_ids().reshape({-1, options.top_k()}).to(x.device());
    given_ids = tokens.select(given_ids);
    check_ids(given_ids, options.num_experts());
  }
  GateOutput out = custom_.is_empty() ? route(tokens, rows, given_ids) : route_custom(rows);
  out.topk_ids = tokens.spread(out.topk_ids, -1);
  out.topk_weights = tokens.spread(out.topk_weights, 0);
  return out;
}

GateOutput GateImpl::route(const Tokens& tokens, const at::Tensor& rows,
                           const at::Tensor& given_ids) {
  const int64_t count = rows.size(0), experts = options.num_experts(), k = options.top_k();
  check_sizes("gate.weight", weight, {experts, options.hidden_size()});
  if (expert_bias.defined()) check_sizes("gate.expert_bias", expert_bias, {experts});
  const at::ScalarType dtype = rows.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  at::Tensor logits = at::linear(rows.to(dtype), weight.to(dtype));
  if (options.logit_noise() > 0 && is_training())
    logits = logits + options.logit_noise() * noise_for(logits, options);

  // Logarithms of the scores, but for a constant of each row: they tell apart, and divide, scores
  // that are themselves too small for a float.
  const bool softmax = options.score_function() == "softmax";
  const at::Tensor log_scores = softmax ? logits : at::log_sigmoid(logits);

  at::Tensor ids = given_ids;
  if (!ids.defined()) {
    at::Tensor chosen_by =
        softmax ? logits.detach() : at::sigmoid(logits.detach()) + expert_bias.to(dtype);
    if (options.top_k_groups() < options.num_groups())
      chosen_by = in_best_groups(chosen_by, options, /*logarithms=*/softmax);
    ids = best_of(chosen_by, k);
  }
  const at::Tensor none = given_ids.defined() ? ids.lt(0) : at::Tensor();
  const at::Tensor index = given_ids.defined() ? ids.clamp_min(0) : ids;
  at::Tensor weights;
  if (options.normalize_top_k().value_or(k > 1)) {
    at::Tensor chosen = log_scores.gather(1, index);
    if (none.defined())  // a row without any is left as it is, or its gradient would be NaN
      chosen = chosen.masked_fill(none.logical_and(none.all(1, true).logical_not()),
                                  -std::numeric_limits<double>::infinity());
    weights = at::softmax(chosen, 1);
  } else {
    weights = (softmax ? at::softmax(logits, 1) : at::sigmoid(logits)).gather(1, index);
  }
  if (options.routed_scaling_factor() != 1) weights = weights * options.routed_scaling_factor();
  if (none.defined()) weights = weights.masked_fill(none, 0);

  GateOutput out;
  out.load = counts_of(ids, experts);
  out.dropped = at::zeros_like(out.load);
  if (is_training() && at::GradMode::is_enabled()) {
    const std::lock_guard lock(load_mutex_);
    load_since_update_ = load_since_update_.to(out.load.device()) + out.load;
  }

  // Without tokens the losses are 0 but still hang on the graph, as on the other ranks.
  out.aux_loss = out.z_loss = count == 0 ? logits.sum() : logits.new_zeros({});
  if (options.aux_loss_coeff() > 0) {
    const at::Tensor p = at::softmax(log_scores, 1);
    out.mean_probability = count == 0 ? p.sum(0) : p.mean(0);
    if (count > 0) {
      out.aux_loss = options.aux_loss_scope() == "sequence" ? aux_loss_of_sequences(tokens, p, ids)
                                                            : aux_loss(out, out.load);
    }
  }
  if (options.z_loss_coeff() > 0 && count > 0) {
    out.z_loss = at::logsumexp(logits, {1}).square().mean() * options.z_loss_coeff();
  }

  const int64_t capacity =
      options.capacity_factor() > 0 && !given_ids.defined() ? capacity_of(count, options) : count;
  if (capacity < count) {
    at::Tensor priority;
    if (options.drop_policy() == "probs")
      priority = (softmax ? at::log_softmax(logits.detach(), 1) : logits.detach()).gather(1, ids);
    const at::Tensor keep = fits_capacity(ids, priority, experts, capacity);
    ids = at::where(keep, ids, -1);
    weights = at::where(keep, weights, 0.0);
    out.dropped = out.load - counts_of(ids, experts);
  }
  out.topk_ids = ids;
  out.topk_weights = weights;
  return out;
}

GateOutput GateImpl::route_custom(const at::Tensor& rows) {
  GateOutput out = custom_.forward<GateOutput>(rows);
  const std::array<int64_t, 2> sizes = {rows.size(0), options.top_k()};
  const at::ScalarType dtype = rows.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto check = [&](const char* name, const at::Tensor& got, at::ScalarType wanted) {
    LSHMOE_VALIDATE(got.defined(), "the custom gate returned no ", name,
                    " (topk_ids and topk_weights are needed): set them in its GateOutput");
    LSHMOE_VALIDATE(got.scalar_type() == wanted && got.sizes() == at::IntArrayRef(sizes),
                    "the custom gate returned ", name, " of ", got.scalar_type(), " ", got.sizes(),
                    " (must be ", wanted, " ", at::IntArrayRef(sizes), ", [tokens, top_k])");
  };
  check("topk_ids", out.topk_ids, at::kLong);
  check("topk_weights", out.topk_weights, dtype);
  check_ids(out.topk_ids, options.num_experts());
  out.load = counts_of(out.topk_ids, options.num_experts());
  out.dropped = at::zeros_like(out.load);
  out.mean_probability = at::Tensor();
  for (at::Tensor* loss : {&out.aux_loss, &out.z_loss})
    if (!loss->defined()) *loss = out.topk_weights.new_zeros({});
  return out;
}

at::Tensor GateImpl::aux_loss(const GateOutput& out, const at::Tensor& load) const {
  LSHMOE_VALIDATE(
      out.mean_probability.defined(),
      "this gate has no aux loss (its aux_loss_coeff is 0, or it is a custom gate): set "
      "aux_loss_coeff");
  const at::Tensor f = load.to(out.mean_probability.options());
  return (f / f.sum().clamp_min(1) * out.mean_probability).sum() *
         (options.aux_loss_coeff() * static_cast<double>(options.num_experts()));
}

at::Tensor GateImpl::aux_loss_of_sequences(const Tokens& tokens, const at::Tensor& p,
                                           const at::Tensor& ids) const {
  const int64_t experts = options.num_experts(), sequences = tokens.sequences;
  const at::Tensor of_sequence = tokens.spread(ids, -1).view({sequences, -1});
  const at::Tensor first = experts * at::arange(sequences, ids.options()).unsqueeze(1);
  const at::Tensor load =
      counts_of(at::where(of_sequence.ge(0), of_sequence + first, -1), sequences * experts)
          .view({sequences, experts})
          .to(p.scalar_type());
  const at::Tensor f = load / load.sum(1, true).clamp_min(1);
  const auto sums = [&](const at::Tensor& rows) {
    return tokens.spread(rows, 0).view({sequences, tokens.length, rows.size(1)}).sum(1);
  };
  const at::Tensor count = sums(at::ones({p.size(0), 1}, p.options())).squeeze(1);
  const at::Tensor losses = (f * sums(p)).sum(1) / count.clamp_min(1);
  return losses.sum() / count.gt(0).sum() *
         (options.aux_loss_coeff() * static_cast<double>(experts));
}

void GateImpl::discard_load() {
  const std::lock_guard lock(load_mutex_);
  load_since_update_.zero_();
}

void GateImpl::update_expert_bias(Communicator& world) {
  if (!expert_bias.defined()) return;
  const at::NoGradGuard no_grad;
  at::Tensor counted;
  {
    const std::lock_guard lock(load_mutex_);
    counted = std::exchange(load_since_update_, at::zeros_like(load_since_update_));
  }
  const at::Tensor load = sum_over(world, counted).to(at::kDouble);
  expert_bias +=
      options.expert_bias_rate() * at::sign(load.mean() - load).to(expert_bias.options());
}

}  // namespace lshmoe
