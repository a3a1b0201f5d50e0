#include "tests/support/dense_moe.hpp"

#include <ATen/CPUGeneratorImpl.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "lshmoe/comm/self/self.hpp"

namespace lshmoe::testing {
namespace {

at::Tensor logistic(const at::Tensor& x) { return 1 / (1 + at::exp(-x)); }

/// One token [hidden] through expert e of the parameters named `prefix`.
at::Tensor dense_expert(const at::Tensor& x, const std::map<std::string, at::Tensor>& parameters,
                        const std::string& prefix, int64_t e, const std::string& activation) {
  const auto parameter = [&](const char* name) { return parameters.at(prefix + name)[e]; };
  const at::Tensor pre = parameter("w1").mv(x);
  if (activation == "swiglu")
    return parameter("w2").mv(pre * logistic(pre) * parameter("w3").mv(x));
  const at::Tensor biased = pre + parameter("b1");
  const at::Tensor hidden = activation == "relu"
                                ? at::where(biased > 0, biased, 0.0)
                                : 0.5 * biased * (1 + at::erf(biased / std::sqrt(2.0)));
  return parameter("w2").mv(hidden) + parameter("b2");
}

/// The k experts of the highest `score`, ties to the lowest index.
std::vector<int64_t> choose(const at::Tensor& scores, int64_t k) {
  const auto score = scores.accessor<double, 1>();
  std::vector<int64_t> chosen;
  for (int64_t i = 0; i < k; ++i) {
    int64_t best = -1;
    for (int64_t e = 0; e < score.size(0); ++e) {
      if (std::find(chosen.begin(), chosen.end(), e) != chosen.end()) continue;
      if (best < 0 || score[e] > score[best]) best = e;
    }
    chosen.push_back(best);
  }
  return chosen;
}

/// Drops the choices beyond each expert's capacity.
void drop(DenseRouting& routing, const std::vector<double>& chosen_score, const GateOptions& o) {
  const int64_t tokens = routing.ids.size(0), k = o.top_k();
  const auto capacity = static_cast<std::size_t>(
      std::ceil(static_cast<double>(tokens * k) / static_cast<double>(o.num_experts()) *
                o.capacity_factor()));
  at::Tensor ids = routing.ids.clone(), keep = at::ones_like(routing.weights);
  for (int64_t e = 0; e < o.num_experts(); ++e) {
    std::vector<int64_t> slots;  // token * k + choice
    for (int64_t s = 0; s < tokens * k; ++s)
      if (ids.view(-1)[s].item<int64_t>() == e) slots.push_back(s);
    if (o.drop_policy() == "probs")
      std::stable_sort(slots.begin(), slots.end(), [&](int64_t a, int64_t b) {
        return chosen_score[static_cast<std::size_t>(a)] >
               chosen_score[static_cast<std::size_t>(b)];
      });
    for (std::size_t i = capacity; i < slots.size(); ++i) {
      ids.view(-1)[slots[i]] = -1;
      keep.view(-1)[slots[i]] = 0;
    }
  }
  routing.ids = ids;
  routing.weights = routing.weights * keep;
}

}  // namespace

DenseRouting dense_gate(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                        const GateOptions& o) {
  const int64_t tokens = x.size(0), experts = o.num_experts(), k = o.top_k();
  const bool softmax = o.score_function() == "softmax";
  DenseRouting routing;
  routing.load.assign(static_cast<std::size_t>(experts), 0);
  std::vector<int64_t> ids;
  std::vector<at::Tensor> weights;
  std::vector<double> chosen_score;
  at::Tensor probability_sum = at::zeros({experts}, at::kDouble);
  at::Tensor z = at::zeros({}, at::kDouble);
  for (int64_t t = 0; t < tokens; ++t) {
    const at::Tensor logits = weight.mv(x[t]);
    const at::Tensor exponentials = at::exp(logits);
    const at::Tensor score = softmax ? exponentials / exponentials.sum() : logistic(logits);
    const auto chosen = choose(softmax ? score.detach() : score.detach() + bias.to(at::kDouble), k);
    at::Tensor norm = at::zeros({}, at::kDouble);
    for (const int64_t e : chosen) norm = norm + score[e];
    for (const int64_t e : chosen) {
      ids.push_back(e);
      weights.push_back(!softmax || o.normalize_top_k().value_or(k > 1) ? score[e] / norm
                                                                        : score[e]);
      chosen_score.push_back(score[e].item<double>());
      ++routing.load[static_cast<std::size_t>(e)];
    }
    probability_sum = probability_sum + (softmax ? score : score / score.sum());
    z = z + at::log(exponentials.sum()).square();
  }
  routing.ids = at::tensor(ids, at::kLong).view({tokens, k});
  routing.weights =
      tokens > 0 ? at::stack(weights).view({tokens, k}) : at::zeros({0, k}, at::kDouble);
  const double count = static_cast<double>(std::max<int64_t>(tokens, 1));
  const at::Tensor f = at::tensor(routing.load, at::kLong).to(at::kDouble);
  routing.aux_loss = o.aux_loss_coeff() * static_cast<double>(experts) /
                     (static_cast<double>(k) * count) * (f * (probability_sum / count)).sum();
  routing.z_loss = o.z_loss_coeff() * z / count;
  if (o.capacity_factor() > 0) drop(routing, chosen_score, o);
  return routing;
}

DenseLayer::DenseLayer(const MoELayerOptions& options)
    : options_(options), gate_options_(options.hidden_size(), options.num_experts()) {
  MoELayer whole(options, make_expert_groups(make_self_communicator()));
  make_round(*whole);
  gate_options_ = whole->gate->options;
  for (const auto& parameter : whole->named_parameters()) {
    parameters[parameter.key()] =
        parameter.value().detach().to(at::kDouble).clone().set_requires_grad(true);
  }
  if (whole->gate->expert_bias.defined()) expert_bias = whole->gate->expert_bias.clone();
}

DenseOutput DenseLayer::forward(const at::Tensor& x) const {
  DenseOutput out;
  out.routing = dense_gate(x, parameters.at("gate.weight"), expert_bias, gate_options_);
  std::vector<at::Tensor> rows;
  for (int64_t t = 0; t < x.size(0); ++t) {
    at::Tensor y = at::zeros({x.size(1)}, at::kDouble);
    for (int64_t i = 0; i < options_.top_k(); ++i) {
      const auto e = out.routing.ids[t][i].item<int64_t>();
      if (e < 0) continue;
      y = y + out.routing.weights[t][i] *
                  dense_expert(x[t], parameters, "experts.", e, options_.activation());
    }
    if (options_.shared_expert_size() > 0)
      y = y + dense_expert(x[t], parameters, "shared_expert.", 0, options_.activation());
    rows.push_back(y);
  }
  out.output = rows.empty() ? at::zeros_like(x) : at::stack(rows);
  return out;
}

void make_round(torch::nn::Module& module) {
  const at::NoGradGuard no_grad;
  for (at::Tensor& parameter : module.parameters())
    parameter.copy_(parameter.to(at::kBFloat16).to(parameter.scalar_type()));
}

at::Tensor random_rows(int64_t tokens, int64_t hidden, uint64_t seed, int rank) {
  at::Generator stream =
      at::make_generator<at::CPUGeneratorImpl>(seed * 1000 + static_cast<uint64_t>(rank));
  return at::randn({tokens, hidden}, stream).to(at::kBFloat16).to(at::kDouble);
}

double relative_error(const at::Tensor& got, const at::Tensor& expected) {
  if (!got.defined() || got.sizes() != expected.sizes())
    return std::numeric_limits<double>::infinity();
  if (expected.numel() == 0) return 0;
  const auto largest = [](const at::Tensor& t) {
    return t.detach().to(at::kDouble).abs().max().item<double>();
  };
  const double error = largest(got.detach().to(at::kDouble) - expected.detach().to(at::kDouble));
  // NaN must not pass for a small number.
  return error == 0          ? 0
         : std::isnan(error) ? std::numeric_limits<double>::infinity()
                             : error / largest(expected);
}

}  // namespace lshmoe::testing
