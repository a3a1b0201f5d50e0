#include "lshmoe/moe/source.hpp"

#include <ATen/record_function.h>

#include <numeric>

#include "lshmoe/moe/ops/common.hpp"

namespace lshmoe {
namespace {

/// Dispatched::plan of restore=source.
enum PlanEntry : std::size_t {
  kX,                 ///< [tokens, hidden], in the graph
  kWeights,           ///< [tokens, k], in the graph
  kCentroids,         ///< [sent, hidden], in the graph
  kToken,             ///< int64 [assignments], by (expert, token)
  kSlot,              ///< int64 [assignments]: token * k + choice
  kCentroidOf,        ///< int64 [assignments]
  kSentPerGroup,      ///< int64 [num_experts]
  kReceivedPerGroup,  ///< int64 [ranks * num_local_experts]
  kPeersRouted,       ///< int64 [ranks]: rows of the peers' plans for this rank
  kPosition,          ///< int64 [received]: place among the experts' rows
  kProbes,            ///< int64 [2, probes]: centroids that are probes, those of their clusters
  kPlanEntries
};

/// The choices ordered by (expert, token).
struct Choices {
  std::vector<int64_t> token, slot, per_expert;
};

Choices choices_of(const at::Tensor& topk_ids, int64_t num_experts) {
  const int64_t tokens = topk_ids.size(0), k = topk_ids.size(1);
  const auto* ids = topk_ids.const_data_ptr<int64_t>();
  Choices c;
  c.per_expert.assign(static_cast<std::size_t>(num_experts), 0);
  std::vector<int64_t> met(c.per_expert.size(), -1);
  for (int64_t i = 0; i < tokens * k; ++i) {
    const int64_t id = ids[i], t = i / k;
    if (id == -1) continue;
    LSHMOE_VALIDATE(id >= 0 && id < num_experts, "topk_ids[", t, "][", i % k, "] is ", id,
                    " (experts are 0 .. ", num_experts - 1, ", -1 = dropped)");
    const auto e = static_cast<std::size_t>(id);
    LSHMOE_VALIDATE(met[e] != t, "topk_ids[", t, "] names expert ", id,
                    " twice (a token goes to an expert once): pass different experts");
    met[e] = t;
    ++c.per_expert[e];
  }
  std::vector<int64_t> next(c.per_expert.size(), 0);
  std::partial_sum(c.per_expert.begin(), c.per_expert.end() - 1, next.begin() + 1);
  const int64_t total = next.back() + c.per_expert.back();
  c.token.resize(static_cast<std::size_t>(total));
  c.slot.resize(c.token.size());
  for (int64_t i = 0; i < tokens * k; ++i) {
    if (ids[i] == -1) continue;
    const auto place = static_cast<std::size_t>(next[static_cast<std::size_t>(ids[i])]++);
    c.token[place] = i / k;
    c.slot[place] = i;
  }
  return c;
}

/// Each expert's alpha [num_experts], in double: by least squares over its probes, else the option.
/// outputs and centroids [sent, hidden], expert_of int64 [sent].
at::Tensor estimate_alpha(const at::Tensor& outputs, const at::Tensor& centroids,
                          const at::Tensor& probes, const at::Tensor& expert_of,
                          int64_t num_experts, double otherwise) {
  const at::NoGradGuard no_grad;
  const auto difference = [&](const at::Tensor& rows) {
    return rows.index_select(0, probes[0]).to(at::kDouble) -
           rows.index_select(0, probes[1]).to(at::kDouble);
  };
  const at::Tensor of_outputs = difference(outputs), of_inputs = difference(centroids);
  const at::Tensor expert = expert_of.index_select(0, probes[0]);
  const auto per_expert = [&](const at::Tensor& products) {
    return at::zeros({num_experts}, products.options()).index_add(0, expert, products.sum(1));
  };
  const at::Tensor squares = per_expert(of_inputs * of_inputs);
  return at::where(squares > 0, per_expert(of_outputs * of_inputs) / squares, otherwise);
}

int64_t sum(const std::vector<int64_t>& values, int64_t first, int64_t last) {
  return std::accumulate(values.begin() + first, values.begin() + last, int64_t{0});
}

}  // namespace

Dispatched dispatch_centroids(const at::Tensor& x_in, const at::Tensor& topk_ids,
                              const at::Tensor& topk_weights, const ops::ExchangePtr& exchange) {
  ExchangeContext& context = exchange->context();
  const DispatcherOptions& options = context.options;
  const int64_t hidden = options.hidden_size(), ranks = context.ranks(),
                local = context.num_local_experts(), own = context.comm->rank();
  LSHMOE_VALIDATE(x_in.dim() == 2 && x_in.size(1) == hidden, "x is ", x_in.sizes(),
                  " (must be [tokens, ", hidden, "])");
  const at::ScalarType accumulate = ops::weight_type(x_in.scalar_type());
  LSHMOE_VALIDATE(
      topk_ids.dim() == 2 && topk_ids.size(0) == x_in.size(0) && topk_ids.size(1) >= 1 &&
          topk_ids.scalar_type() == at::kLong && topk_weights.sizes() == topk_ids.sizes() &&
          topk_weights.scalar_type() == accumulate && topk_weights.device() == x_in.device(),
      "topk_ids is ", topk_ids.scalar_type(), " ", topk_ids.sizes(), ", topk_weights is ",
      topk_weights.scalar_type(), " ", topk_weights.sizes(), " on ", topk_weights.device(),
      " (must be int64 and ", accumulate, " [tokens, k] for ", x_in.size(0), " tokens on ",
      x_in.device(), ")");
  const at::Tensor x = x_in.contiguous();
  const at::Device device = x.device();
  const Choices choices = choices_of(to_host({topk_ids})[0], options.num_experts());
  // Of the host; what torch's ops read is on the rows' device.
  const at::Tensor token = at::tensor(choices.token, at::kLong);
  const auto on_device = to_device({token, at::tensor(choices.slot, at::kLong)}, device);

  // Cluster what leaves this rank.
  const int64_t assignments = token.size(0);
  const bool own_stays = !options.codec_on_self();
  const int64_t own_first = sum(choices.per_expert, 0, own * local),
                own_count = own_stays ? sum(choices.per_expert, own * local, (own + 1) * local) : 0;
  std::vector<int64_t> coded = choices.per_expert;
  if (own_stays) std::fill_n(coded.begin() + own * local, local, 0);
  const int64_t after = assignments - own_first - own_count;
  const at::Tensor coded_token =
      at::cat({token.narrow(0, 0, own_first), token.narrow(0, own_first + own_count, after)});
  Encoded encoded;
  DirectionStats& stats = (*exchange->stats)[Direction::dispatch];
  try {
    RECORD_FUNCTION("lshmoe::encode", std::vector<c10::IValue>{});
    const PhaseTimer::Span span(stats.codec_time, x.device());
    encoded = context.codec(Direction::dispatch, x).encode(x.detach(), coded_token, coded);
  } catch (const NonFiniteRow& error) {
    const std::vector<int64_t> nothing(coded.size(), 0);
    encoded = Encoded();
    encoded.bytes = at::empty({0}, x.options().dtype(at::kByte));
    encoded.bytes_per_group = nothing;
    RowsOut out;
    out.rows = x;
    out.rows_per_group = nothing;
    out.encoded = &encoded;
    out.non_finite_row = error.row;
    (void)exchange->swap(out);  // throws StepAbandoned on every rank
  }
  add_codec_stats(stats, encoded.stats);

  // This rank's own rows stand among the centroids, each alone.
  std::vector<int64_t> sent = encoded.centroids_per_group;
  const int64_t before = sum(sent, 0, own * local);
  if (own_stays)
    std::copy_n(choices.per_expert.begin() + own * local, local, sent.begin() + own * local);
  const at::Tensor own_token = on_device[0].narrow(0, own_first, own_count);
  const at::Tensor decoded =
      at::cat({encoded.centroids.narrow(0, 0, before), x.detach().index_select(0, own_token),
               encoded.centroids.slice(0, before)});
  const at::Tensor& assignment = encoded.assignment;
  LSHMOE_ASSERT(assignment.size(0) == coded_token.size(0) && assignment.ge(0).all().item<bool>());
  const at::Tensor centroid_of =
      at::cat({assignment.narrow(0, 0, own_first),
               at::arange(before, before + own_count, assignment.options()),
               assignment.slice(0, own_first) + own_count});

  // c = mean + stop_gradient(c' - mean): c' in value, the mean in its gradient.
  const at::Tensor members = at::bincount(centroid_of, {}, decoded.size(0)).to(accumulate);
  const at::Tensor mean =
      at::zeros({decoded.size(0), hidden}, x.options().dtype(accumulate))
          .index_add(0, centroid_of, x.index_select(0, on_device[0]).to(accumulate)) /
      members.unsqueeze(1);
  const at::Tensor centroids = decoded + (mean - mean.detach()).to(x.scalar_type());

  std::vector<int64_t> routed;
  for (int64_t r = 0; r < ranks; ++r)
    routed.push_back(sum(choices.per_expert, r * local, (r + 1) * local));
  const at::Tensor none = at::empty({0}, at::kLong), sent_per_group = at::tensor(sent, at::kLong);
  const auto [received, received_per_group, peers_routed, ones] =
      ops::swap_rows(centroids, none, sent_per_group, at::tensor(routed, at::kLong), none,
                     encoded.bytes, at::tensor(encoded.bytes_per_group, at::kLong),
                     static_cast<int64_t>(Direction::dispatch), exchange);

  // Expert-major, then source rank.
  Dispatched d;
  d.stats = exchange->stats;
  const auto* counts = received_per_group.const_data_ptr<int64_t>();
  d.tokens_per_expert.assign(static_cast<std::size_t>(local), 0);
  for (int64_t g = 0; g < ranks * local; ++g)
    d.tokens_per_expert[static_cast<std::size_t>(g % local)] += counts[g];
  std::vector<int64_t> next;
  int64_t places = 0;
  for (const int64_t count : d.tokens_per_expert) {
    next.push_back(places);
    d.rows_per_expert.push_back((count + options.alignment() - 1) / options.alignment() *
                                options.alignment());
    places += d.rows_per_expert.back();
  }
  at::Tensor position = at::empty({received.size(0)}, at::kLong);
  auto* place = position.mutable_data_ptr<int64_t>();
  for (int64_t g = 0; g < ranks * local; ++g)
    for (int64_t i = 0; i < counts[g]; ++i) *place++ = next[static_cast<std::size_t>(g % local)]++;
  position = to_device({position}, device)[0];
  d.rows = at::zeros({places, hidden}, x.options()).index_copy(0, position, received);
  d.row_weights = at::zeros({places}, ones.options()).index_copy(0, position, ones);
  d.plan.resize(kPlanEntries);
  d.plan[kX] = x;
  d.plan[kWeights] = topk_weights;
  d.plan[kCentroids] = centroids;
  d.plan[kToken] = on_device[0];
  d.plan[kSlot] = on_device[1];
  d.plan[kCentroidOf] = centroid_of;
  d.plan[kSentPerGroup] = sent_per_group;
  d.plan[kReceivedPerGroup] = received_per_group;
  d.plan[kPeersRouted] = peers_routed;
  d.plan[kPosition] = position;
  std::vector<int64_t> alone, left;
  const at::Tensor assigned = encoded.probes.empty() ? at::Tensor() : to_host({assignment})[0];
  for (const Probe& probe : encoded.probes) {
    const int64_t shift = probe.row < own_first ? 0 : own_count;
    alone.push_back(assigned.const_data_ptr<int64_t>()[probe.row] + shift);
    left.push_back(probe.cluster + shift);
  }
  d.plan[kProbes] =
      at::stack({at::tensor(alone, at::kLong), at::tensor(left, at::kLong)}).to(device);
  return d;
}

at::Tensor combine_centroids(const at::Tensor& expert_output, const Dispatched& d,
                             const ops::ExchangePtr& exchange) {
  LSHMOE_VALIDATE(d.plan.size() == kPlanEntries && d.rows.defined(),
                  "combine needs what dispatch of the same Dispatcher returned, unchanged");
  LSHMOE_VALIDATE(expert_output.sizes() == d.rows.sizes(), "expert_output is ",
                  expert_output.sizes(), " (must be ", d.rows.sizes(),
                  ", as the rows that dispatch returned)");
  const at::Tensor &x = d.plan[kX], &token = d.plan[kToken], &centroid_of = d.plan[kCentroidOf];
  const at::Tensor none = at::empty({0}, at::kLong);
  const at::Tensor outputs = std::get<0>(ops::swap_rows(
      expert_output.index_select(0, d.plan[kPosition]), d.row_weights, d.plan[kReceivedPerGroup],
      d.plan[kPeersRouted], d.plan[kSentPerGroup], at::empty({0}, at::kByte), none,
      static_cast<int64_t>(Direction::combine), exchange));

  RECORD_FUNCTION("lshmoe::combine", std::vector<c10::IValue>{});
  const at::ScalarType accumulate = ops::weight_type(expert_output.scalar_type());
  const DispatcherOptions& options = exchange->context().options;
  const CodecOptions& codec = options.codec(Direction::dispatch);
  at::Tensor terms = outputs.index_select(0, centroid_of).to(accumulate);
  if (codec.estimate_alpha() || codec.alpha() != 0) {
    const at::Tensor &centroids = d.plan[kCentroids], &sent = d.plan[kSentPerGroup];
    at::Tensor alpha =
        at::full({options.num_experts()}, codec.alpha(), x.options().dtype(at::kDouble));
    const at::Tensor expert_of = at::repeat_interleave(sent).to(x.device());
    if (codec.estimate_alpha()) {
      alpha = estimate_alpha(outputs, centroids, d.plan[kProbes], expert_of, options.num_experts(),
                             codec.alpha());
      const at::Tensor estimated = alpha.cpu();
      d.stats->alpha.assign(estimated.const_data_ptr<double>(),
                            estimated.const_data_ptr<double>() + estimated.numel());
    }
    const at::Tensor alpha_of =
        alpha.to(accumulate).index_select(0, expert_of.index_select(0, centroid_of)).unsqueeze(1);
    terms = terms + alpha_of * (x.index_select(0, token).to(accumulate) -
                                centroids.index_select(0, centroid_of).to(accumulate));
  }
  const at::Tensor weights =
      d.plan[kWeights].reshape({-1}).index_select(0, d.plan[kSlot]).unsqueeze(1);
  return at::zeros({x.size(0), x.size(1)}, x.options().dtype(accumulate))
      .index_add(0, token, terms * weights)
      .to(expert_output.scalar_type());
}

}  // namespace lshmoe
