#include "tests/support/dense_moe.hpp"

#include <ATen/CPUGeneratorImpl.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "lshmoe/comm/self/self.hpp"

namespace lshmoe::testing {
namespace {

at::Tensor logistic(const at::Tensor& x) { return 1 / (1 + at::exp(-x)); }

/// log(logistic(x)), also where that is 0.
at::Tensor log_logistic(const at::Tensor& x) {
  return at::where(x < 0, x, 0.0) - at::log(1 + at::exp(at::where(x < 0, x, -x)));
}

/// exp(x) / sum of exp(x), also where they overflow.
at::Tensor shares(const at::Tensor& x) {
  const at::Tensor exponentials = at::exp(x - x.detach().max());
  return exponentials / exponentials.sum();
}

/// log of the sum of exp(x), also where that overflows.
at::Tensor log_sum_exp(const at::Tensor& x) {
  const at::Tensor most = x.detach().max();
  return most + at::log(at::exp(x - most).sum());
}

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

/// The k of `among` of the highest score, ties to the lowest index.
std::vector<int64_t> choose(const std::vector<double>& score, const std::vector<int64_t>& among,
                            int64_t k) {
  std::vector<int64_t> chosen = among;
  std::stable_sort(chosen.begin(), chosen.end(), [&](int64_t a, int64_t b) {
    return score[static_cast<std::size_t>(a)] > score[static_cast<std::size_t>(b)];
  });
  chosen.resize(static_cast<std::size_t>(k));
  return chosen;
}

std::vector<int64_t> numbers(int64_t first, int64_t count) {
  std::vector<int64_t> all(static_cast<std::size_t>(count));
  std::iota(all.begin(), all.end(), first);
  return all;
}

/// The experts of the top_k_groups groups whose two best scores have the greatest sum.
std::vector<int64_t> experts_in_best_groups(const std::vector<double>& score,
                                            const GateOptions& o) {
  const int64_t size = o.num_experts() / o.num_groups();
  std::vector<double> of_group;
  for (int64_t g = 0; g < o.num_groups(); ++g) {
    double sum = 0;
    for (const int64_t e : choose(score, numbers(g * size, size), std::min<int64_t>(2, size)))
      sum += score[static_cast<std::size_t>(e)];
    of_group.push_back(sum);
  }
  std::vector<int64_t> experts;
  for (const int64_t g : choose(of_group, numbers(0, o.num_groups()), o.top_k_groups()))
    for (const int64_t e : numbers(g * size, size)) experts.push_back(e);
  std::sort(experts.begin(), experts.end());
  return experts;
}

/// Drops the choices beyond each expert's capacity. `taking`: tokens that take part. Factors of at
/// most four decimals, which makes the capacity a quotient of integers.
void drop(DenseRouting& routing, const std::vector<double>& chosen_score, int64_t taking,
          const GateOptions& o) {
  const int64_t tokens = routing.ids.size(0), k = o.top_k();
  const int64_t above = taking * k * std::llround(o.capacity_factor() * 10000),
                below = o.num_experts() * 10000;
  const auto capacity = static_cast<std::size_t>((above + below - 1) / below);
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
                        const GateOptions& o, const DenseInputs& inputs) {
  const int64_t tokens = x.size(0), experts = o.num_experts(), k = o.top_k();
  const bool softmax = o.score_function() == "softmax";
  DenseRouting routing;
  std::vector<int64_t> ids;
  std::vector<at::Tensor> weights;
  std::vector<double> chosen_score;
  // Of each sequence: choices of each expert, sum of probabilities, tokens that take part.
  const auto sequences = static_cast<std::size_t>(inputs.sequences);
  std::vector<std::vector<int64_t>> load(
      sequences, std::vector<int64_t>(static_cast<std::size_t>(experts), 0));
  std::vector<at::Tensor> probability(sequences, at::zeros({experts}, at::kDouble));
  std::vector<int64_t> taking(sequences, 0);
  at::Tensor z = at::zeros({}, at::kDouble);
  for (int64_t t = 0; t < tokens; ++t) {
    const auto s = static_cast<std::size_t>(t * inputs.sequences / tokens);
    if (inputs.mask.defined() && !inputs.mask[t].item<bool>()) {
      for (int64_t i = 0; i < k; ++i) {
        ids.push_back(-1);
        weights.push_back(at::zeros({}, at::kDouble));
        chosen_score.push_back(0);
      }
      continue;
    }
    const at::Tensor logits = weight.mv(x[t]);
    const at::Tensor log_score = softmax ? logits - log_sum_exp(logits) : log_logistic(logits);
    const at::Tensor choice =
        softmax ? at::exp(log_score.detach()) : logistic(logits.detach()) + bias.to(at::kDouble);
    const std::vector<double> score(choice.const_data_ptr<double>(),
                                    choice.const_data_ptr<double>() + experts);
    std::vector<int64_t> chosen;
    if (inputs.topk_ids.defined()) {
      for (int64_t i = 0; i < k; ++i) chosen.push_back(inputs.topk_ids[t][i].item<int64_t>());
    } else {
      chosen = choose(score, experts_in_best_groups(score, o), k);
    }
    std::vector<at::Tensor> log_chosen;
    for (const int64_t e : chosen)
      if (e >= 0) log_chosen.push_back(log_score[e]);
    const bool normalized = o.normalize_top_k().value_or(k > 1);
    at::Tensor weight_of_chosen;
    if (!log_chosen.empty()) {
      weight_of_chosen = at::stack(log_chosen);
      weight_of_chosen = o.routed_scaling_factor() *
                         (normalized ? shares(weight_of_chosen) : at::exp(weight_of_chosen));
    }
    int64_t next = 0;
    for (const int64_t e : chosen) {
      ids.push_back(e);
      chosen_score.push_back(e < 0 ? 0 : std::exp(log_score[e].item<double>()));
      weights.push_back(e < 0 ? at::zeros({}, at::kDouble) : weight_of_chosen[next++]);
      if (e >= 0) ++load[s][static_cast<std::size_t>(e)];
    }
    probability[s] = probability[s] + shares(log_score);
    ++taking[s];
    z = z + log_sum_exp(logits).square();
  }
  routing.ids = at::tensor(ids, at::kLong).view({tokens, k});
  routing.weights =
      tokens > 0 ? at::stack(weights).view({tokens, k}) : at::zeros({0, k}, at::kDouble);

  routing.load.assign(static_cast<std::size_t>(experts), 0);
  for (const auto& of_sequence : load)
    for (std::size_t e = 0; e < of_sequence.size(); ++e) routing.load[e] += of_sequence[e];
  // coeff * E * sum_i f_i P_i, f_i the share of the choices, P_i the mean probability.
  const auto aux = [&](const std::vector<int64_t>& choices, const at::Tensor& sum, int64_t count) {
    const at::Tensor f = at::tensor(choices, at::kLong).to(at::kDouble);
    const double all = std::max(1.0, f.sum().item<double>());
    return o.aux_loss_coeff() * static_cast<double>(experts) *
           (f / all * sum / static_cast<double>(std::max<int64_t>(1, count))).sum();
  };
  const int64_t all_taking = std::accumulate(taking.begin(), taking.end(), int64_t{0});
  routing.aux_loss = at::zeros({}, at::kDouble);
  if (o.aux_loss_scope() == "sequence") {
    int64_t counted = 0;
    for (std::size_t s = 0; s < sequences; ++s) {
      routing.aux_loss = routing.aux_loss + aux(load[s], probability[s], taking[s]);
      counted += taking[s] > 0 ? 1 : 0;
    }
    routing.aux_loss = routing.aux_loss / static_cast<double>(std::max<int64_t>(1, counted));
  } else {
    const bool world = o.aux_loss_scope() == "world" && !inputs.world_load.empty();
    at::Tensor sum = at::zeros({experts}, at::kDouble);
    for (const at::Tensor& of_sequence : probability) sum = sum + of_sequence;
    routing.aux_loss = aux(world ? inputs.world_load : routing.load, sum, all_taking);
  }
  routing.z_loss = o.z_loss_coeff() * z / static_cast<double>(std::max<int64_t>(1, all_taking));
  if (o.capacity_factor() > 0 && !inputs.topk_ids.defined())
    drop(routing, chosen_score, all_taking, o);
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

DenseOutput DenseLayer::forward(const at::Tensor& x, const DenseInputs& inputs) const {
  DenseOutput out;
  out.routing = dense_gate(x, parameters.at("gate.weight"), expert_bias, gate_options_, inputs);
  std::vector<at::Tensor> rows;
  for (int64_t t = 0; t < x.size(0); ++t) {
    at::Tensor y = at::zeros({x.size(1)}, at::kDouble);
    if (inputs.mask.defined() && !inputs.mask[t].item<bool>()) {
      rows.push_back(y);
      continue;
    }
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
