// Codecs in the layer and its dispatcher: what they cost at the transport, what they may change,
// and the gradients through them.

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <map>

#include "lshmoe/moe/layer.hpp"
#include "lshmoe/runtime/abandon.hpp"
#include "tests/compress/rows.hpp"
#include "tests/support/errors.hpp"
#include "tests/support/layer_runs.hpp"
#include "tests/support/main.hpp"

namespace lshmoe {
namespace {
using testing::dense_gate;
using testing::expect_error;
using testing::expect_runs_equal;
using testing::input_of_rank;
using testing::LayerRun;
using testing::make_layer;
using testing::random_rows;
using testing::RankInput;
using testing::relative_error;
using testing::run_layer;
using testing::world;

constexpr int64_t kHidden = 32, kExperts = 8, kTopK = 3;
constexpr std::array kDirections = {Direction::dispatch, Direction::combine,
                                    Direction::combine_backward, Direction::dispatch_backward};

int64_t ranks() { return world()->size(); }
int64_t own_rank() { return world()->rank(); }
int64_t local_experts() { return kExperts / ranks(); }

int64_t tokens_of(int64_t rank) {
  return std::array{40, 0, 7, 1}[static_cast<std::size_t>(rank % 4)];
}
RankInput own_input() { return input_of_rank(world()->rank(), tokens_of(own_rank()), kHidden); }

MoELayerOptions small() {
  return MoELayerOptions(kHidden, 24, kExperts).top_k(kTopK).seed(6).layer(0);
}
CodecOptions lsh(double max_error) { return CodecOptions().max_error(max_error); }
CodecOptions source(double alpha) { return CodecOptions().restore("source").alpha(alpha); }

/// Whether any of the token's choices [k] is an expert of `rank`.
bool goes_to(const at::Tensor& choices, int64_t rank) {
  return choices.div(local_experts(), "floor").eq(rank).any().item<bool>();
}

// --- what is counted ---

struct CodecCase {
  const char* name;
  CodecOptions codec;
};
void PrintTo(const CodecCase& codec_case, std::ostream* out) { *out << codec_case.name; }
class CodecTest : public ::testing::TestWithParam<CodecCase> {};

std::vector<CodecCase> all_codecs() {
  return {{"none", CodecOptions().kind("none")},
          {"bf16", CodecOptions().kind("bf16")},
          {"lsh", lsh(0.1)},
          {"lsh_group", lsh(0.1).error_reference("group").refine(0)},
          {"lsh_whole", lsh(0)},
          {"source", source(1)}};
}

TEST_P(CodecTest, CollectivesAndBytesAreThoseOfTheStatistics) {
  const bool restores_at_source = GetParam().codec.restore() == "source";
  for (int ep = 1; ep <= ranks(); ep *= 2) {
    SCOPED_TRACE(::testing::Message() << "ep_size " << ep);
    const ExpertGroups groups = make_expert_groups(world(), ep);
    const Communicator& comm = *groups.expert;
    MoELayer layer = make_layer(small().codec(GetParam().codec), groups);
    const RankInput input = own_input();
    constexpr std::array kPurposes = {Purpose::dispatch, Purpose::combine,
                                      Purpose::combine_backward, Purpose::dispatch_backward,
                                      Purpose::plan};
    std::array<Traffic, 5> before;
    for (std::size_t i = 0; i < 5; ++i) before[i] = comm.traffic(kPurposes[i]);
    const Traffic all_before = comm.traffic();
    const LayerRun run = run_layer(layer, input.rows, at::kFloat, input.direction);
    std::array<int64_t, 5> bytes, calls;
    for (std::size_t i = 0; i < 5; ++i) {
      const Traffic after = comm.traffic(kPurposes[i]);
      bytes[i] = static_cast<int64_t>(after.bytes_sent - before[i].bytes_sent);
      calls[i] = static_cast<int64_t>(after.calls - before[i].calls);
    }
    const Traffic all_after = comm.traffic();
    EXPECT_EQ(all_after.calls - all_before.calls, ep == 1 ? 0U : 8U);
    EXPECT_EQ(calls,
              ep == 1 ? (std::array<int64_t, 5>{}) : (std::array<int64_t, 5>{1, 1, 1, 1, 4}));

    // Rows of the plan between each pair of ranks, from the choices.
    const at::Tensor ids = dense_gate(input.rows, layer->gate->weight.detach().to(at::kDouble), {},
                                      layer->gate->options)
                               .ids;
    std::vector<int64_t> routed(static_cast<std::size_t>(ep * ep), 0);  // [from, to]
    for (int64_t t = 0; t < ids.size(0); ++t) {
      for (int64_t r = 0; r < ep; ++r) {
        const int64_t choices = ids[t].div(kExperts / ep, "floor").eq(r).sum().item<int64_t>();
        routed[static_cast<std::size_t>(comm.rank() * ep + r)] +=
            restores_at_source ? choices : std::min<int64_t>(choices, 1);
      }
    }
    groups.expert->all_reduce(std::span(routed), ReduceOp::sum, Purpose::control);
    int64_t away = 0, here = 0;
    for (int r = 0; r < ep; ++r) {
      if (r == comm.rank()) continue;
      away += routed[static_cast<std::size_t>(comm.rank() * ep + r)];
      here += routed[static_cast<std::size_t>(r * ep + comm.rank())];
    }
    const std::array<int64_t, 4> raw_rows = {away, here, away, here};
    const int64_t sizes = bytes[4] / 4;  // the same in all four directions
    EXPECT_EQ(sizes > 0, ep > 1);
    for (std::size_t i = 0; i < 4; ++i) {
      const DirectionStats& stats = (*run.stats.exchange)[kDirections[i]];
      EXPECT_EQ(bytes[i] + sizes, stats.codec_bytes + stats.plan_bytes) << name_of(kDirections[i]);
      EXPECT_EQ(stats.bytes_raw, 2 * kHidden * raw_rows[i]) << name_of(kDirections[i]);
      EXPECT_EQ(stats.codec_bytes > 0, raw_rows[i] > 0) << name_of(kDirections[i]);
      EXPECT_LE(stats.max_error_ratio, 1) << name_of(kDirections[i]);
    }

    // Without gradients: the two exchanges of the forward alone.
    const at::NoGradGuard no_grad;
    (void)layer->forward(input.rows.to(at::kFloat));
    EXPECT_EQ(comm.traffic().calls - all_after.calls, ep == 1 ? 0U : 4U + 1U);  // 1: all_reduce
  }
}

TEST_P(CodecTest, ReadsNoMemoryThatNobodyWrote) {
  const ExpertGroups groups = make_expert_groups(world());
  const RankInput input = own_input();
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    for (const int64_t alignment : {1, 4}) {
      for (const bool codec_on_self : {false, true}) {
        SCOPED_TRACE(::testing::Message()
                     << dtype << ", alignment " << alignment << ", " << codec_on_self);
        MoELayer layer = make_layer(small()
                                        .codec(GetParam().codec)
                                        .alignment(alignment)
                                        .codec_on_self(codec_on_self)
                                        .capacity_factor(0.9)
                                        .shared_expert_size(5),
                                    groups);
        const LayerRun expected = run_layer(layer, input.rows, dtype, input.direction);
        // at::empty gives NaN, or the largest integer.
        at::globalContext().setDeterministicAlgorithms(true, /*warn_only=*/true);
        at::globalContext().setDeterministicFillUninitializedMemory(true);
        EXPECT_TRUE(at::empty({9}).isnan().all().item<bool>());
        const LayerRun poisoned = run_layer(layer, input.rows, dtype, input.direction);
        at::globalContext().setDeterministicAlgorithms(false, false);
        expect_runs_equal(poisoned, expected, 0);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Codecs, CodecTest, ::testing::ValuesIn(all_codecs()),
                         [](const auto& info) { return std::string(info.param.name); });

// --- what may not change ---

TEST(LayerCodec, WithoutErrorTheBitsAreTheUncompressedOnes) {
  const ExpertGroups groups = make_expert_groups(world());
  const RankInput input = own_input();
  const MoELayerOptions options = small().aux_loss_coeff(0.1).shared_expert_size(8);
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    MoELayer plain = make_layer(options, groups);
    const LayerRun expected = run_layer(plain, input.rows, dtype, input.direction);
    for (const CodecOptions& codec :
         {lsh(0), lsh(0).refine(0), lsh(0).max_clusters(0), lsh(0).error_reference("group")}) {
      for (const bool codec_on_self : {false, true}) {
        MoELayerOptions coded = options;
        MoELayer layer = make_layer(coded.codec(codec).codec_on_self(codec_on_self), groups);
        expect_runs_equal(run_layer(layer, input.rows, dtype, input.direction), expected, 0);
      }
    }
  }
}

TEST(LayerCodec, RestoreAtSourceOfTokensAloneIsTheUncompressedLayer) {
  const ExpertGroups groups = make_expert_groups(world());
  const RankInput input = input_of_rank(world()->rank(), 3 + own_rank(), kHidden);
  MoELayer plain = make_layer(small(), groups);
  const LayerRun expected = run_layer(plain, input.rows, at::kFloat, input.direction);
  for (const double alpha : {0.0, 1.0}) {
    SCOPED_TRACE(alpha);
    MoELayer layer = make_layer(small().codec(source(alpha).refine(0)).codec_on_self(true), groups);
    const LayerRun got = run_layer(layer, input.rows, at::kFloat, input.direction);
    const DirectionStats& stats = (*got.stats.exchange)[Direction::dispatch];
    EXPECT_EQ(stats.clusters, stats.rows);
    EXPECT_EQ(stats.rows, kTopK * input.rows.size(0));
    expect_runs_equal(got, expected, 1e-5);
  }
}

TEST(LayerCodec, RestoreAtSourceOfEqualTokensIsTheUncompressedLayer) {
  const ExpertGroups groups = make_expert_groups(world());
  // Every rank its own token, many times; its experts each make one cluster of it: clusters never
  // mix experts.
  const at::Tensor rows = random_rows(1, kHidden, 8, world()->rank()).expand({12, kHidden});
  const at::Tensor direction = random_rows(12, kHidden, 9, world()->rank());
  MoELayer plain = make_layer(small(), groups),
           layer = make_layer(small().codec(source(1)).codec_on_self(true), groups);
  const LayerRun expected = run_layer(plain, rows, at::kFloat, direction);
  const LayerRun got = run_layer(layer, rows, at::kFloat, direction);
  const DirectionStats& stats = (*got.stats.exchange)[Direction::dispatch];
  EXPECT_EQ(stats.rows, kTopK * 12);
  EXPECT_EQ(stats.clusters, kTopK);
  EXPECT_LE(relative_error(got.output, expected.output), 1e-5);
  // Through one centroid the tokens' own gradients are shared, but their sum, and what the experts
  // and the router get, stays.
  for (const auto& [name, gradient] : expected.gradients) {
    const auto sum = [&](const at::Tensor& g) { return name == "x" ? g.sum(0) : g; };
    EXPECT_LE(relative_error(sum(got.gradients.at(name)), sum(gradient)), 1e-4) << name;
  }
}

TEST(LayerCodec, EveryDirectionHasItsOwnSettings) {
  const ExpertGroups groups = make_expert_groups(world());
  const RankInput input = input_of_rank(world()->rank(), 40, kHidden);
  const auto row = [](double max_error) { return lsh(max_error).error_reference("row"); };
  const std::array<double, 4> bounds = {0.1, 0.3, 0.02, 0.02};  // by Direction
  MoELayer layer = make_layer(
      small().codec(row(0.1)).codec_combine(row(0.3)).codec_backward(row(0.02)).codec_on_self(true),
      groups);
  const LayerRun run = run_layer(layer, input.rows, at::kFloat, input.direction);
  for (const Direction d : kDirections) {
    const DirectionStats& stats = (*run.stats.exchange)[d];
    const double bound = bounds[static_cast<std::size_t>(d)];
    EXPECT_LE(stats.max_relative_error, bound * (1 + 1e-9)) << name_of(d);
    EXPECT_GT(stats.max_relative_error, 0.6 * bound) << name_of(d);
    EXPECT_LE(stats.max_error_ratio, 1) << name_of(d);
    EXPECT_GT(stats.max_error_ratio, 0.6) << name_of(d);
  }
  // One alone: the others carry rows as they are.
  for (const bool combine : {true, false}) {
    MoELayerOptions options = small().codec_on_self(true);
    combine ? options.codec_combine(row(0.1)) : options.codec_backward(row(0.1));
    MoELayer one = make_layer(options, groups);
    const LayerRun some = run_layer(one, input.rows, at::kFloat, input.direction);
    for (const Direction d : kDirections) {
      const bool coded =
          combine ? d == Direction::combine
                  : d == Direction::combine_backward || d == Direction::dispatch_backward;
      EXPECT_EQ((*some.stats.exchange)[d].max_relative_error > 0, coded) << name_of(d);
    }
  }
}

TEST(LayerCodec, ErrorsOfTheBackwardReachTheCaller) {
  // On all ranks alike.
  const ExpertGroups groups = make_expert_groups(world());
  MoELayer layer = make_layer(small().codec(lsh(0.1)).codec_on_self(true), groups);
  const at::Tensor x =
      random_rows(5, kHidden, 1, world()->rank()).to(at::kFloat).set_requires_grad(true);
  at::Tensor gradient = at::ones({5, kHidden});
  gradient[3][2] = NAN;
  const at::Tensor y = layer->forward(x).output;
  expect_error<StepAbandoned>("NaN",
                              [&] { (void)torch::autograd::grad({y}, {x}, {gradient}, true); });
  expect_error("second derivatives", [&] {
    (void)torch::autograd::grad({y}, {x}, {at::ones_like(y)}, true, /*create_graph=*/true);
  });
  // The layer still works.
  EXPECT_TRUE(torch::autograd::grad({y}, {x}, {at::ones_like(y)})[0].isfinite().all().item<bool>());
}

// --- rows at the receiver, and gradients, through the dispatcher ---

struct Routed {
  at::Tensor x, ids, weights;  ///< f64 [tokens, hidden], int64 and f32 [tokens, k]
};
/// What a rank routes, known to all. The rows lie around a few centers, so that clusters pay.
Routed routed_of(int64_t rank, int64_t tokens) {
  at::Generator stream = at::make_generator<at::CPUGeneratorImpl>(static_cast<uint64_t>(40 + rank));
  const at::Tensor centers = 2 * random_rows(5, kHidden, 17, 0);
  Routed r;
  r.x = (centers.index_select(0, at::randint(5, {tokens}, stream, at::kLong)) +
         random_rows(tokens, kHidden, 18, static_cast<int>(rank)))
            .to(at::kBFloat16)
            .to(at::kDouble);
  r.ids = std::get<1>(at::sort(at::rand({tokens, kExperts}, stream), 1)).narrow(1, 0, kTopK);
  r.ids = at::where(at::rand({tokens, kTopK}, stream) < 0.15, -1, r.ids);
  r.weights = at::rand({tokens, kTopK}, stream);
  return r;
}

TEST(DispatcherCodec, EveryRowKeepsItsBoundAtTheReceiver) {
  const ExpertGroups groups = make_expert_groups(world());
  for (const bool by_group : {false, true}) {
    for (const bool codec_on_self : {false, true}) {
      for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
        for (const double max_error : {0.02, 0.2}) {
          SCOPED_TRACE(::testing::Message()
                       << by_group << codec_on_self << dtype << " " << max_error);
          const Dispatcher dispatcher(
              DispatcherOptions(kHidden, kExperts)
                  .codec(lsh(max_error).error_reference(by_group ? "group" : "row"))
                  .codec_on_self(codec_on_self),
              groups);
          const auto tokens = [](int64_t rank) { return 150 + 30 * rank; };
          const auto routed = [&tokens](int64_t rank) {
            Routed r = routed_of(rank, tokens(rank));
            r.x.slice(0, 0, tokens(rank), 20).mul_(64);  // outliers
            return r;
          };
          const Routed own = routed(own_rank());
          const Dispatched d = dispatcher.dispatch(own.x.to(dtype), own.ids, own.weights);
          const at::Tensor rows = d.rows.to(at::kDouble);
          int64_t place = 0, changed = 0;
          for (int64_t e = 0; e < local_experts(); ++e) {
            for (int64_t r = 0; r < ranks(); ++r) {
              const Routed sent = routed(r);
              // What r gives its codec: the tokens to each rank.
              std::vector<int64_t> call, per_rank;
              std::map<int64_t, int64_t> place_in_call;  // of the tokens to this rank
              for (int64_t to = 0; to < ranks(); ++to) {
                const std::size_t before = call.size();
                for (int64_t t = 0; t < tokens(r); ++t) {
                  if ((to == r && !codec_on_self) || !goes_to(sent.ids[t], to)) continue;
                  if (to == own_rank()) place_in_call[t] = std::ssize(call);
                  call.push_back(t);
                }
                per_rank.push_back(static_cast<int64_t>(call.size() - before));
              }
              const at::Tensor references = testing::references(
                  sent.x.index_select(0, at::tensor(call, at::kLong)), per_rank, by_group);
              for (int64_t t = 0; t < tokens(r); ++t) {
                if (!sent.ids[t].eq(own_rank() * local_experts() + e).any().item<bool>()) continue;
                const double error = (rows[place] - sent.x[t]).norm().item<double>();
                const double bound =
                    r == own_rank() && !codec_on_self
                        ? 0
                        : max_error * references[place_in_call.at(t)].item<double>();
                EXPECT_LE(error, bound * (1 + 1e-6))
                    << "expert " << e << ", token " << t << " of rank " << r;
                changed += error > 0;
                ++place;
              }
            }
          }
          EXPECT_EQ(place, rows.size(0));
          EXPECT_EQ(changed > place / 4, ranks() > 1 || codec_on_self) << changed;
        }
      }
    }
  }
}

/// The rows that go to other ranks, as the codec of `direction` hands them over there: [ranks] of
/// [tokens, hidden]. Rows that stay, or do not go to that rank, are themselves.
std::vector<at::Tensor> through_codec(const at::Tensor& x, const at::Tensor& ids,
                                      const CodecOptions& options, Direction direction) {
  std::vector<int64_t> index, per_rank;
  for (int64_t r = 0; r < ranks(); ++r) {
    const std::size_t before = index.size();
    for (int64_t t = 0; t < x.size(0); ++t)
      if (r != own_rank() && goes_to(ids[t], r)) index.push_back(t);
    per_rank.push_back(static_cast<int64_t>(index.size() - before));
  }
  const auto codec = make_codec(options, {kHidden, 0, direction, at::kFloat});
  const at::Tensor picked = at::tensor(index, at::kLong);
  const Encoded encoded = codec->encode(x.detach().to(at::kFloat), picked, per_rank);
  const at::Tensor decoded =
      codec->decode(encoded.bytes, encoded.bytes_per_group).rows.to(at::kDouble);
  std::vector<at::Tensor> rows;
  int64_t first = 0;
  for (const int64_t count : per_rank) {
    at::Tensor copy = x.detach().to(at::kDouble).clone();
    if (count > 0)
      copy.index_copy_(0, picked.narrow(0, first, count), decoded.narrow(0, first, count));
    rows.push_back(copy);
    first += count;
  }
  return rows;
}

TEST(DispatcherCodec, GradientsAreThoseOfTheFormulas) {
  // x'_r: the tokens as rank r sees them. y = sum_r y_r, y_r = sum over r's experts of w E(x'_r);
  // on the way back rank r sees g'_r, and dL/dx := dL/dx'. Experts: tanh(x M).
  const ExpertGroups groups = make_expert_groups(world());
  const CodecOptions options = lsh(0.1).error_reference("row");
  at::Generator shared = at::make_generator<at::CPUGeneratorImpl>(3);
  const at::Tensor initial = at::randn({kExperts, kHidden, kHidden}, shared) / 8;
  const int64_t tokens = own_rank() == 1 ? 0 : 60 + own_rank();
  const Routed own = routed_of(own_rank(), tokens);
  const at::Tensor direction = random_rows(tokens, kHidden, 33, world()->rank());
  for (const bool all_directions : {false, true}) {
    SCOPED_TRACE(all_directions);
    DispatcherOptions settings = DispatcherOptions(kHidden, kExperts).layer(0);
    all_directions ? settings.codec(options) : settings.codec_dispatch(options);
    const Dispatcher dispatcher(settings, groups);
    const at::Tensor x = own.x.to(at::kFloat).set_requires_grad(true),
                     w = own.weights.clone().set_requires_grad(true),
                     m = initial.clone().set_requires_grad(true);
    const Dispatched d = dispatcher.dispatch(x, own.ids, w);
    std::vector<at::Tensor> outputs;
    const auto blocks = d.rows.split_with_sizes(d.rows_per_expert);
    for (std::size_t e = 0; e < blocks.size(); ++e)
      outputs.push_back(
          at::tanh(blocks[e].mm(m[dispatcher.first_local_expert() + static_cast<int64_t>(e)])));
    const at::Tensor y = dispatcher.combine(at::cat(outputs), d);
    const auto got = torch::autograd::grad({y}, {x, w, m}, {direction.to(at::kFloat)});

    const std::vector<at::Tensor> seen =
        through_codec(own.x, own.ids, options, Direction::dispatch);
    const std::vector<at::Tensor> seen_gradient =
        all_directions ? through_codec(direction, own.ids, options, Direction::combine_backward)
                       : std::vector<at::Tensor>(static_cast<std::size_t>(ranks()), direction);
    const at::Tensor exact_w = own.weights.to(at::kDouble).set_requires_grad(true),
                     exact_m = initial.to(at::kDouble).set_requires_grad(true);
    std::vector<at::Tensor> leaves;
    at::Tensor total = at::zeros({}, at::kDouble), sum = at::zeros({tokens, kHidden}, at::kDouble),
               output_bound = at::zeros({tokens}, at::kDouble), moved = at::zeros({}, at::kDouble);
    for (int64_t r = 0; r < ranks(); ++r) {
      const auto i = static_cast<std::size_t>(r);
      leaves.push_back(seen[i].clone().set_requires_grad(true));
      moved += (seen[i] - own.x).abs().sum();
      at::Tensor part = at::zeros({tokens, kHidden}, at::kDouble);
      for (int64_t e = r * local_experts(); e < (r + 1) * local_experts(); ++e)
        part = part + (exact_w * own.ids.eq(e)).sum(1, true) * at::tanh(leaves[i].mm(exact_m[e]));
      total = total + (part * seen_gradient[i]).sum();
      sum += part.detach();
      if (r != own_rank()) output_bound += 0.1 * part.detach().norm(2, 1);
    }
    EXPECT_EQ(moved.item<double>() > 1, ranks() > 1 && tokens > 0);
    leaves.push_back(exact_w);
    leaves.push_back(exact_m);
    const auto want = torch::autograd::grad({total}, leaves);
    at::Tensor dx = at::zeros_like(sum), dx_bound = at::zeros({tokens}, at::kDouble);
    for (int64_t r = 0; r < ranks(); ++r) {
      dx += want[static_cast<std::size_t>(r)];
      if (r != own_rank()) dx_bound += 0.1 * want[static_cast<std::size_t>(r)].norm(2, 1);
    }
    at::Tensor dm = want.back().contiguous();
    world()->all_reduce(std::span(dm.data_ptr<double>(), static_cast<std::size_t>(dm.numel())),
                        ReduceOp::sum, Purpose::control);

    EXPECT_LE(relative_error(got[1], want[want.size() - 2]), 1e-5);
    EXPECT_LE(relative_error(got[2].narrow(0, own_rank() * local_experts(), local_experts()),
                             dm.narrow(0, own_rank() * local_experts(), local_experts())),
              1e-5);
    if (!all_directions) {
      EXPECT_LE(relative_error(y, sum), 1e-5);
      EXPECT_LE(relative_error(got[0], dx), 1e-5);
    } else {
      // What comes back is coded at the experts' ranks: within the bound of each rank's part.
      const auto within = [](const at::Tensor& value, const at::Tensor& exact,
                             const at::Tensor& bound) {
        const at::Tensor error = (value.detach().to(at::kDouble) - exact).norm(2, 1);
        EXPECT_TRUE((error <= bound + 1e-4).all().item<bool>()) << at::max(error - bound);
        EXPECT_EQ(error.sum().item<double>() > 0.1 * bound.sum().item<double>() + 1e-2,
                  ranks() > 1 && error.numel() > 0);
      };
      within(y, sum, output_bound);
      within(got[0], dx, dx_bound);
    }
  }
}

}  // namespace
}  // namespace lshmoe
