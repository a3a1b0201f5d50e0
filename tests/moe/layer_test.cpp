// The layer against the dense loop, forward and backward, at any number of ranks.

#include "lshmoe/moe/layer.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <set>
#include <thread>

#include "lshmoe/comm/self/self.hpp"
#include "lshmoe/moe/gradients.hpp"
#include "lshmoe/moe/layer_number.hpp"
#include "tests/support/errors.hpp"
#include "tests/support/layer_runs.hpp"
#include "tests/support/main.hpp"

namespace lshmoe {
namespace {
using testing::DenseInputs;
using testing::DenseLayer;
using testing::DenseRun;
using testing::expect_error;
using testing::expect_runs_equal;
using testing::input_of_rank;
using testing::LayerRun;
using testing::make_layer;
using testing::RankInput;
using testing::relative_error;
using testing::run_dense;
using testing::run_layer;
using testing::world;

constexpr int64_t kHidden = 16, kFfn = 32;

/// bfloat16 keeps 3 digits, and the router's gradient is a difference of outputs.
double tolerance_of(at::ScalarType dtype) {
  return dtype == at::kDouble ? 1e-12 : dtype == at::kFloat ? 1e-5 : 5e-2;
}

MoELayerOptions small(int64_t experts = 8) {
  return MoELayerOptions(kHidden, kFfn, experts).seed(3).layer(2);
}

RankInput own_input(int64_t tokens, uint64_t seed = 1) {
  return input_of_rank(world()->rank(), tokens, kHidden, seed);
}

std::vector<int64_t> same_on_all(int64_t tokens) {
  return std::vector<int64_t>(static_cast<std::size_t>(world()->size()), tokens);
}

/// 0, 1, 7 and 33 tokens, dealt to the ranks from `shift` on.
std::vector<int64_t> uneven(int shift) {
  std::vector<int64_t> tokens;
  for (int r = 0; r < world()->size(); ++r)
    tokens.push_back(std::array{33, 0, 7, 1}[static_cast<std::size_t>((r + shift) % 4)]);
  return tokens;
}

int64_t own(const std::vector<int64_t>& tokens_of_rank) {
  return tokens_of_rank[static_cast<std::size_t>(world()->rank())];
}

/// Forward and all gradients are those of the dense loop. expert_bias: undefined, or the gate's.
/// The rows are inputs.sequences sequences.
void expect_dense(const MoELayerOptions& options, const ExpertGroups& groups,
                  const RankInput& input, const std::vector<at::ScalarType>& dtypes,
                  const at::Tensor& expert_bias, const DenseInputs& inputs) {
  DenseLayer dense(options);
  if (expert_bias.defined()) dense.expert_bias = expert_bias;
  const DenseRun expected = run_dense(dense, options, groups, input, inputs);
  const auto in_sequences = [&](const at::Tensor& rows) {
    return inputs.sequences == 1 ? rows : rows.view({inputs.sequences, -1, kHidden});
  };
  for (const at::ScalarType dtype : dtypes) {
    SCOPED_TRACE(dtype);
    MoELayer layer = make_layer(options, groups, dtype);
    if (expert_bias.defined()) layer->gate->expert_bias.copy_(expert_bias);
    LayerRun got = run_layer(layer, in_sequences(input.rows), dtype, in_sequences(input.direction),
                             RouteInputs(inputs.mask).topk_ids(inputs.topk_ids));
    for (at::Tensor* rows : {&got.output, &got.gradients.at("x")})
      *rows = rows->view({-1, kHidden});
    expect_runs_equal(got, expected.run, tolerance_of(dtype));
    EXPECT_EQ(got.stats.tokens_per_expert, expected.tokens_per_expert);
    if (!inputs.mask.defined()) continue;
    for (const at::Tensor& rows : {got.output, got.gradients.at("x")}) {
      const at::Tensor masked = rows.index({inputs.mask.logical_not()});
      EXPECT_TRUE(at::equal(masked, at::zeros_like(masked)));
    }
  }
}

void expect_dense(const MoELayerOptions& options, const ExpertGroups& groups,
                  const std::vector<int64_t>& tokens_of_rank,
                  const std::vector<at::ScalarType>& dtypes, const at::Tensor& expert_bias = {}) {
  expect_dense(options, groups, own_input(own(tokens_of_rank)), dtypes, expert_bias, {});
}

/// A mask of about two thirds of the tokens, another on each rank; the last rank's tokens are all
/// masked where there are more ranks.
at::Tensor some_mask(int64_t tokens) {
  const int rank = world()->rank();
  if (rank > 0 && rank == world()->size() - 1) return at::zeros({tokens}, at::kBool);
  return (at::arange(tokens) + rank).remainder(3).ne(1);
}

/// Padding may hold anything.
RankInput with_nan(RankInput input, const at::Tensor& mask) {
  input.rows.masked_fill_(mask.logical_not().unsqueeze(1), NAN);
  return input;
}

class LayerTest : public ::testing::TestWithParam<std::tuple<int, int, const char*>> {};

TEST_P(LayerTest, EqualsDenseLoop) {
  const auto [experts, k, activation] = GetParam();
  if (k > experts || experts % world()->size() != 0) GTEST_SKIP() << "no such layer";
  const ExpertGroups groups = make_expert_groups(world());
  for (const int64_t tokens : {1, 4, 33}) {
    SCOPED_TRACE(tokens);
    expect_dense(
        small(experts).top_k(k).activation(activation).aux_loss_coeff(0.1).z_loss_coeff(0.01),
        groups, same_on_all(tokens), {at::kDouble, at::kFloat, at::kBFloat16});
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, LayerTest,
                         ::testing::Combine(::testing::Values(1, 4, 8), ::testing::Values(1, 2, 3),
                                            ::testing::Values("relu", "gelu", "swiglu")));

TEST(Layer, UnevenTokens) {
  const ExpertGroups groups = make_expert_groups(world());
  for (int shift = 0; shift < 4; ++shift) {
    SCOPED_TRACE(shift);
    expect_dense(small().top_k(2).aux_loss_coeff(0.1), groups, uneven(shift),
                 {at::kDouble, at::kFloat});
  }
  expect_dense(small().top_k(2), groups, same_on_all(0), {at::kDouble, at::kFloat});
}

TEST(Layer, AllTokensToOneRank) {
  // Expert 5 alone, or experts 4 and 5: all others, and most ranks, get no row.
  const ExpertGroups groups = make_expert_groups(world());
  for (const int64_t k : {1, 2}) {
    SCOPED_TRACE(k);
    at::Tensor bias = at::zeros({8});
    bias.slice(0, 6 - k, 6) += 10;
    expect_dense(small().top_k(k).score_function("sigmoid").aux_loss_coeff(10), groups, uneven(0),
                 {at::kDouble, at::kFloat}, bias);
  }
}

TEST(Layer, SharedExpertCapacityAndAlignment) {
  const ExpertGroups groups = make_expert_groups(world());
  for (const char* activation : {"gelu", "swiglu"}) {
    for (const char* policy : {"probs", "position"}) {
      SCOPED_TRACE(::testing::Message() << activation << " " << policy);
      expect_dense(small()
                       .activation(activation)
                       .drop_policy(policy)
                       .capacity_factor(0.75)
                       .alignment(8)
                       .shared_expert_size(12),
                   groups, uneven(0), {at::kDouble, at::kBFloat16});
    }
  }
}

TEST(Layer, MaskedTokensHaveNoPart) {
  const ExpertGroups groups = make_expert_groups(world());
  for (const char* score : {"softmax", "sigmoid"}) {
    for (const int64_t overlap : {1, 2}) {
      SCOPED_TRACE(::testing::Message() << score << ", overlap " << overlap);
      DenseInputs inputs;
      inputs.mask = some_mask(24);
      inputs.sequences = 4;
      const MoELayerOptions options = small()
                                          .score_function(score)
                                          .aux_loss_coeff(0.5)
                                          .z_loss_coeff(0.1)
                                          .capacity_factor(0.75)
                                          .shared_expert_size(12)
                                          .overlap_degree(overlap);
      const RankInput input = with_nan(own_input(24), inputs.mask);
      expect_dense(options, groups, input, {at::kDouble, at::kFloat, at::kBFloat16}, {}, inputs);
      expect_dense(MoELayerOptions(options).aux_loss_scope("sequence"), groups, input,
                   {at::kDouble}, {}, inputs);
    }
  }
}

TEST(Layer, MaskedTokensAreAsIfTheyWereNotThere) {
  const ExpertGroups groups = make_expert_groups(world());
  const CodecOptions lsh = CodecOptions().kind("lsh").max_error(0.1);
  for (const at::Tensor& mask : {some_mask(40), at::zeros({40}, at::kBool)}) {
    const RankInput input = with_nan(own_input(40), mask);
    for (const CodecOptions& codec :
         {CodecOptions().kind("none"), lsh, CodecOptions(lsh).restore("source").alpha(1)}) {
      SCOPED_TRACE(codec.kind() + " " + codec.restore());
      MoELayer layer =
          make_layer(small().aux_loss_coeff(0.5).codec(codec).codec_on_self(true), groups);
      LayerRun got = run_layer(layer, input.rows, at::kFloat, input.direction, mask);
      const LayerRun expected =
          run_layer(layer, input.rows.index({mask}), at::kFloat, input.direction.index({mask}));
      for (at::Tensor* rows : {&got.output, &got.gradients.at("x")}) {
        const at::Tensor masked = rows->index({mask.logical_not()});
        EXPECT_TRUE(at::equal(masked, at::zeros_like(masked)));
        *rows = rows->index({mask});
      }
      expect_runs_equal(got, expected, 0);
    }
  }
}

TEST(Layer, GroupsScalingAndReplay) {
  const ExpertGroups groups = make_expert_groups(world());
  const MoELayerOptions options = small()
                                      .top_k(2)
                                      .num_groups(4)
                                      .top_k_groups(2)
                                      .routed_scaling_factor(2.5)
                                      .aux_loss_coeff(0.5)
                                      .z_loss_coeff(0.1);
  const at::Tensor bias = testing::random_rows(1, 8, 5, 0).view(-1).to(at::kFloat) / 4;
  for (const char* scope : {"world", "rank", "sequence"}) {
    SCOPED_TRACE(scope);
    DenseInputs inputs;
    inputs.sequences = 3;
    expect_dense(MoELayerOptions(options).aux_loss_scope(scope), groups, own_input(18),
                 {at::kDouble, at::kFloat}, {}, inputs);
    expect_dense(MoELayerOptions(options).aux_loss_scope(scope).score_function("sigmoid"), groups,
                 own_input(18), {at::kDouble, at::kFloat}, bias, inputs);
    inputs.topk_ids =
        at::stack({at::arange(18), at::arange(18) + 1 + world()->rank()}, 1).remainder(8);
    inputs.topk_ids[3][1] = -1;
    inputs.topk_ids[4].fill_(-1);
    expect_dense(MoELayerOptions(options).aux_loss_scope(scope), groups, own_input(18),
                 {at::kDouble, at::kFloat}, {}, inputs);
  }
}

TEST(Layer, ReplaysTheChoicesOfAnEarlierForward) {
  MoELayer layer = make_layer(small().capacity_factor(0.75), make_expert_groups(world()));
  const at::Tensor x = own_input(24).rows.to(at::kFloat).view({4, 6, kHidden});
  const MoEOutput first = layer->forward(x, some_mask(24));
  {
    const at::NoGradGuard no_grad;
    layer->gate->weight.zero_();  // by itself it would now choose the first experts
  }
  const MoEOutput again = layer->forward(x, RouteInputs().topk_ids(first.stats.topk_ids));
  EXPECT_TRUE(at::equal(again.stats.topk_ids, first.stats.topk_ids));
  EXPECT_EQ(again.stats.tokens_per_expert, first.stats.tokens_per_expert);
  EXPECT_FALSE(at::equal(layer->forward(x).stats.topk_ids, first.stats.topk_ids));
}

TEST(Layer, EvaluationNeedsNoRankBeyondItsGroup) {
  MoELayer layer(small().aux_loss_coeff(0.5), make_expert_groups(world(), 1));
  layer->eval();
  if (world()->rank() == 0) {  // alone: the others enter nothing
    const MoEOutput out = layer->forward(input_of_rank(0, 9, kHidden).rows.to(at::kFloat));
    EXPECT_GT(out.aux_loss.item<double>(), 0);
  }
  world()->barrier();
}

TEST(Layer, TheWorldsLoadRidesWithTheDispatch) {
  for (const int64_t overlap : {1, 2}) {
    std::array<std::uint64_t, 2> calls{}, bytes{};
    const ExpertGroups groups = make_expert_groups(world());
    for (const bool with_loss : {false, true}) {
      MoELayer layer(small().overlap_degree(overlap).aux_loss_coeff(with_loss ? 0.5 : 0), groups);
      const auto traffic = [&] {
        Traffic all = groups.expert->traffic();
        all.calls += groups.world->traffic().calls + groups.replica->traffic().calls;
        all.bytes_sent += groups.world->traffic().bytes_sent;
        return all;
      };
      const Traffic before = traffic();
      (void)layer->forward(own_input(12).rows.to(at::kFloat));
      calls[with_loss] = traffic().calls - before.calls;
      bytes[with_loss] = traffic().bytes_sent - before.bytes_sent;
    }
    EXPECT_EQ(calls[1], calls[0]);
    EXPECT_EQ(bytes[1] - bytes[0], 4U * 8 * (world()->size() - 1));  // int32 of 8 experts
  }
}

// The same global batch on 1 rank and on all, in any layout: outputs, losses, reduced gradients.
TEST(Layer, TheNumberOfRanksChangesNothing) {
  const int ranks = world()->size(), rank = world()->rank();
  const auto options_of = [](const char* scope, int64_t overlap) {
    return small()
        .top_k(2)
        .aux_loss_coeff(0.5)
        .aux_loss_scope(scope)
        .z_loss_coeff(0.1)
        .shared_expert_size(8)
        .overlap_degree(overlap);
  };
  for (const bool equal_tokens : {true, false}) {
    std::vector<int64_t> tokens = equal_tokens ? same_on_all(8) : uneven(2);
    const int64_t total = std::accumulate(tokens.begin(), tokens.end(), int64_t{0});
    std::vector<at::Tensor> rows, directions;
    for (int r = 0; r < ranks; ++r) {
      const RankInput input = input_of_rank(r, tokens[static_cast<std::size_t>(r)], kHidden);
      rows.push_back(input.rows);
      directions.push_back(input.direction);
    }
    // The mean over tokens; a rank's loss is scaled by its share of them.
    const double share = static_cast<double>(own(tokens) * ranks) / static_cast<double>(total);
    const auto loss = [](const MoEOutput& out, const at::Tensor& direction) {
      return (out.output * direction).sum() /
                 static_cast<double>(std::max<int64_t>(1, direction.size(0))) +
             out.aux_loss + out.z_loss;
    };
    for (const at::ScalarType dtype : {at::kDouble, at::kFloat}) {
      for (const int64_t overlap : {1, 2}) {
        MoELayer whole =
            make_layer(options_of("world", 1), make_expert_groups(make_self_communicator()), dtype);
        const MoEOutput of_all = whole->forward(at::cat(rows).to(dtype));
        loss(of_all, at::cat(directions).to(dtype)).backward();
        for (const char* scope : {"world", "rank"}) {
          for (int ep = 1; ep <= ranks; ep *= 2) {
            SCOPED_TRACE(::testing::Message() << "scope " << scope << ", ep_size " << ep << ", "
                                              << dtype << ", equal tokens " << equal_tokens);
            const ExpertGroups groups = make_expert_groups(world(), ep);
            MoELayer layer = make_layer(options_of(scope, overlap), groups, dtype);
            GradientReducer reducer(groups, *layer);
            const auto own_rank = static_cast<std::size_t>(rank);
            const MoEOutput out = layer->forward(rows[own_rank].to(dtype));
            (share * loss(out, directions[own_rank].to(dtype))).backward();
            double aux = share * out.aux_loss.item<double>() / ranks;
            world()->all_reduce(std::span(&aux, 1), ReduceOp::sum, Purpose::control);
            reducer.reduce();
            const double whole_aux = of_all.aux_loss.item<double>();
            const double difference = std::abs(aux - whole_aux) / whole_aux;
            if (std::string(scope) == "rank") {
              // What a rank's own load gives is another loss: the test can tell.
              EXPECT_EQ(difference > 1e-3, ranks > 1) << difference;
              continue;
            }
            const double tolerance = dtype == at::kDouble ? 1e-12 : 1e-5;
            EXPECT_LE(difference, tolerance);
            const int64_t first =
                std::accumulate(tokens.begin(), tokens.begin() + rank, int64_t{0});
            EXPECT_LE(relative_error(out.output, of_all.output.narrow(0, first, own(tokens))),
                      tolerance);
            for (const auto& parameter : layer->named_parameters()) {
              at::Tensor expected = whole->named_parameters()[parameter.key()].grad();
              if (parameter.key().rfind("experts.", 0) == 0)
                expected = expected.narrow(0, 8 / ep * groups.expert->rank(), 8 / ep);
              EXPECT_LE(relative_error(parameter.value().grad(), expected), tolerance)
                  << parameter.key();
            }
          }
        }
      }
    }
  }
}

TEST(Layer, ACustomGateTakesThePlaceOfTheBuiltIn) {
  const ExpertGroups groups = make_expert_groups(world());
  const GateOptions gate_options = GateOptions(kHidden, 8).seed(3).layer(2).aux_loss_coeff(0.1);
  MoELayer built_in = make_layer(small().aux_loss_coeff(0.1).aux_loss_scope("rank"), groups);
  MoELayer custom = make_layer(
      small().custom_gate([&] { return torch::nn::AnyModule(Gate(gate_options)); }), groups);
  const at::Tensor mask = some_mask(20);
  const RankInput input = with_nan(own_input(20), mask);
  LayerRun expected = run_layer(built_in, input.rows, at::kFloat, input.direction, mask);
  const LayerRun got = run_layer(custom, input.rows, at::kFloat, input.direction, mask);
  auto node = expected.gradients.extract("gate.weight");
  node.key() = "gate.custom.weight";
  expected.gradients.insert(std::move(node));
  expect_runs_equal(got, expected, 0);
  EXPECT_TRUE(at::equal(got.stats.load, expected.stats.load));
  // Its parameters are shared ones.
  const GradientReducer reducer(groups, *custom);
  EXPECT_EQ(reducer.shared_parameters().size(), 1U);
  discard_step(*custom);
  end_step(*custom);
}

TEST(Layer, EndStepUpdatesBiasesAndCodecsOfEveryLayerOnce) {
  const ExpertGroups groups = make_expert_groups(world());
  const CodecOptions learned =
      CodecOptions().kind("lsh").max_error(0.1).state("learned").codebook_size(8).sample_rows(64);
  const auto make = [&](int64_t layer) {
    return make_layer(small()
                          .layer(layer)
                          .score_function("sigmoid")
                          .expert_bias_rate(0.25)
                          .codec(learned)
                          .codec_on_self(true),
                      groups);
  };
  struct Model : torch::nn::Module {
    Model(MoELayer first, MoELayer second) : layers{std::move(first), std::move(second)} {
      register_module("first", layers[0]);
      inner->push_back(layers[1]);
      inner->push_back(layers[0]);  // shared, not another layer
      register_module("inner", inner);
    }
    std::vector<MoELayer> layers;
    torch::nn::Sequential inner;
  };
  Model model(make(0), make(1)), by_hand(make(0), make(1));
  EXPECT_EQ(moe_layers(model).size(), 2U);
  EXPECT_EQ(moe_layers(*model.layers[0]).size(), 1U);
  for (int step = 0; step < 2; ++step) {
    const RankInput input = own_input(64, static_cast<uint64_t>(step));
    for (Model* one : {&model, &by_hand})
      for (MoELayer& layer : one->layers)
        (void)run_layer(layer, input.rows, at::kFloat, input.direction);
    end_step(model);
    for (MoELayer& layer : by_hand.layers) {
      layer->update_expert_bias();
      layer->refresh_codecs();
    }
    for (std::size_t l = 0; l < 2; ++l) {
      EXPECT_TRUE(
          at::equal(model.layers[l]->gate->expert_bias, by_hand.layers[l]->gate->expert_bias));
      if (step == 0) {
        EXPECT_GT(model.layers[l]->gate->expert_bias.abs().max().item<double>(), 0);
      }
      const auto state = [&](Model& of) {
        return of.layers[l]->dispatcher().state_stats(Direction::dispatch);
      };
      EXPECT_EQ(state(model).version, step + 1);
      EXPECT_EQ(state(model).checksum, state(by_hand).checksum);
    }
  }
}

TEST(Layer, MovesToBfloat16ButForItsRouter) {
  MoELayer layer = make_layer(small().score_function("sigmoid"), make_expert_groups(world()));
  const RankInput input = own_input(9);
  const LayerRun before = run_layer(layer, input.rows, at::kBFloat16, input.direction);
  layer->to(at::kBFloat16);
  EXPECT_EQ(layer->gate->weight.scalar_type(), at::kFloat);
  EXPECT_EQ(layer->gate->expert_bias.scalar_type(), at::kFloat);
  EXPECT_EQ(layer->experts->w1.scalar_type(), at::kBFloat16);
  // The parameters were round: nothing was lost.
  expect_runs_equal(run_layer(layer, input.rows, at::kBFloat16, input.direction), before, 0);
}

TEST(Layer, FiniteDifferences) {
  for (const char* score : {"softmax", "sigmoid"}) {
    SCOPED_TRACE(score);
    MoELayer layer = make_layer(small()
                                    .top_k(3)
                                    .score_function(score)
                                    .aux_loss_coeff(0.5)
                                    .z_loss_coeff(0.1)
                                    .shared_expert_size(8),
                                make_expert_groups(world()), at::kDouble);
    const RankInput input = own_input(5 + world()->rank());
    const at::Tensor x = input.rows.clone();
    const auto sum = [](double value) {
      world()->all_reduce(std::span(&value, 1), ReduceOp::sum, Purpose::control);
      return value;
    };
    const auto loss = [&] {
      const at::NoGradGuard no_grad;
      const MoEOutput out = layer->forward(x);
      return sum(((out.output * input.direction).sum() + out.aux_loss + out.z_loss).item<double>());
    };
    const LayerRun run = run_layer(layer, x, at::kDouble, input.direction);
    // One random direction of all ranks at once for each tensor, named alike on all.
    std::map<std::string, at::Tensor> tensors = {{"x", x}};
    for (const auto& parameter : layer->named_parameters())
      tensors[parameter.key()] = parameter.value();
    constexpr double kStep = 1e-5;
    at::Generator stream =
        at::make_generator<at::CPUGeneratorImpl>(static_cast<uint64_t>(7 + world()->rank()));
    for (const auto& [name, tensor] : tensors) {
      const at::NoGradGuard no_grad;
      const at::Tensor direction = at::randn(tensor.sizes(), stream, tensor.options());
      tensor.add_(direction, kStep);
      const double ahead = loss();
      tensor.sub_(direction, 2 * kStep);
      const double behind = loss();
      tensor.add_(direction, kStep);
      const double difference = (ahead - behind) / (2 * kStep);
      const double expected = sum((run.gradients.at(name) * direction).sum().item<double>());
      EXPECT_NEAR(difference, expected, 1e-7 * std::max(1.0, std::abs(expected))) << name;
      EXPECT_NE(expected, 0) << name;
    }
  }
}

TEST(Layer, LayoutChangesNothing) {
  for (const bool equal_tokens : {true, false}) {
    const std::vector<int64_t> tokens = equal_tokens ? same_on_all(9) : uneven(0);
    const RankInput input = own_input(own(tokens));
    std::optional<LayerRun> alone;
    for (int ep = 1; ep <= world()->size(); ep *= 2) {
      SCOPED_TRACE(::testing::Message() << "ep_size " << ep << ", " << tokens);
      const ExpertGroups groups = make_expert_groups(world(), ep);
      MoELayer layer = make_layer(small().top_k(3).aux_loss_coeff(0.1).shared_expert_size(8),
                                  groups, at::kDouble);
      LayerRun run = run_layer(layer, input.rows, at::kDouble, input.direction);
      // Expert gradients: the sum over all who hold the expert, of the whole world then.
      for (auto& [name, gradient] : run.gradients) {
        if (name.rfind("experts.", 0) != 0) continue;
        groups.replica->all_reduce(
            std::span(gradient.data_ptr<double>(), static_cast<std::size_t>(gradient.numel())),
            ReduceOp::sum, Purpose::gradients);
      }
      if (!alone) {
        alone = run;
        continue;
      }
      LayerRun expected = *alone;
      for (auto& [name, gradient] : expected.gradients)
        if (name.rfind("experts.", 0) == 0)
          gradient = gradient.narrow(0, 8 / ep * groups.expert->rank(), 8 / ep);
      expect_runs_equal(run, expected, 1e-12);
    }
  }
}

TEST(Layer, RunsRepeatBitForBit) {
  const std::vector<int64_t> tokens = uneven(0);
  const RankInput input = own_input(own(tokens));
  const ExpertGroups groups = make_expert_groups(world());
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    MoELayer layer = make_layer(small().top_k(3).aux_loss_coeff(0.1), groups),
             again = make_layer(small().top_k(3).aux_loss_coeff(0.1), groups);
    const LayerRun first = run_layer(layer, input.rows, dtype, input.direction);
    expect_runs_equal(run_layer(layer, input.rows, dtype, input.direction), first, 0);
    expect_runs_equal(run_layer(again, input.rows, dtype, input.direction), first, 0);
  }
}

TEST(Layer, OverlapChangesNoBit) {
  const ExpertGroups groups = make_expert_groups(world());
  struct Case {
    const char* name;
    std::vector<int64_t> tokens;
    MoELayerOptions options;
  };
  const CodecOptions whole = CodecOptions().kind("lsh").max_error(0);
  const Case cases[] = {
      {"gelu", same_on_all(37), small().top_k(3).aux_loss_coeff(0.1)},
      {"swiglu", uneven(0), small().activation("swiglu").shared_expert_size(12)},
      {"relu, capacity", uneven(1), small().activation("relu").capacity_factor(0.75)},
      {"alignment", uneven(2), small().top_k(1).alignment(6).z_loss_coeff(0.1)},
      {"lossless lsh", same_on_all(21), small().codec(whole).codec_on_self(true)},
      {"no tokens", same_on_all(0), small()},
      {"odd sizes", same_on_all(150), MoELayerOptions(50, 70, 4).seed(5).layer(0)},
  };
  for (const Case& c : cases) {
    for (const at::ScalarType dtype : {at::kDouble, at::kFloat, at::kBFloat16}) {
      if (dtype == at::kDouble && c.options.codec(Direction::dispatch).kind() == "lsh") continue;
      const RankInput input =
          input_of_rank(world()->rank(), own(c.tokens), c.options.hidden_size());
      const auto run = [&](int64_t degree) {
        MoELayer layer =
            make_layer(MoELayerOptions(c.options).overlap_degree(degree), groups, dtype);
        return run_layer(layer, input.rows, dtype, input.direction);
      };
      const LayerRun one = run(1);
      for (const int64_t degree : {2, 4}) {
        SCOPED_TRACE(::testing::Message() << c.name << ", " << dtype << ", degree " << degree);
        const LayerRun got = run(degree);
        expect_runs_equal(got, one, 0);
        EXPECT_EQ(got.stats.tokens_per_expert, one.stats.tokens_per_expert);
        for (const Direction d : {Direction::dispatch, Direction::combine,
                                  Direction::combine_backward, Direction::dispatch_backward})
          EXPECT_EQ((*got.stats.exchange)[d].bytes_raw, (*one.stats.exchange)[d].bytes_raw);
      }
    }
  }
}

TEST(Layer, OverlappedBackwardTwiceAndWithoutInputGradients) {
  MoELayer layer = make_layer(small().overlap_degree(3), make_expert_groups(world()), at::kDouble),
           plain = make_layer(small(), make_expert_groups(world()), at::kDouble);
  const RankInput input = own_input(own(uneven(0)));
  const auto gradients = [&](MoELayer& l, int backwards, bool of_input) {
    l->zero_grad();
    l->gate->weight.set_requires_grad(of_input);
    const at::Tensor x = input.rows.clone().set_requires_grad(of_input);
    const at::Tensor y = l->forward(x).output;
    for (int i = 0; i < backwards; ++i) y.backward(input.direction, /*retain_graph=*/true);
    std::vector<at::Tensor> all = {x.grad()};
    for (const at::Tensor& p : l->experts->parameters()) all.push_back(p.grad());
    return all;
  };
  const auto expect_equal = [&](bool of_input) {
    const auto once = gradients(plain, 1, of_input), got = gradients(layer, 1, of_input),
               twice = gradients(layer, 2, of_input);
    for (std::size_t i = 0; i < once.size(); ++i) {
      EXPECT_EQ(got[i].defined(), once[i].defined()) << i;
      if (!once[i].defined()) continue;
      EXPECT_EQ(relative_error(got[i], once[i]), 0) << i;
      EXPECT_EQ(relative_error(twice[i], 2 * once[i]), 0) << i;
    }
  };
  expect_equal(true);
  expect_equal(false);
  // Some of the experts' parameters are frozen, on some ranks.
  for (MoELayer* l : {&layer, &plain})
    (*l)->experts->w1.set_requires_grad(world()->rank() % 2 == 1);
  expect_equal(false);
  layer->gate->weight.set_requires_grad(true);
  const at::NoGradGuard no_grad;
  EXPECT_EQ(relative_error(layer->forward(input.rows).output, plain->forward(input.rows).output),
            0);
}

TEST(Layer, ShapesAndStridesOfTheInput) {
  MoELayer layer = make_layer(small(), make_expert_groups(world()));
  const at::Tensor x = own_input(6).rows.to(at::kFloat);
  const at::Tensor y = layer->forward(x).output;
  const at::Tensor batch = layer->forward(x.view({2, 3, kHidden})).output;
  EXPECT_EQ(batch.sizes(), (std::vector<int64_t>{2, 3, kHidden}));
  EXPECT_TRUE(at::equal(batch.view({6, kHidden}), y));
  const at::Tensor strided = x.t().contiguous().t();
  EXPECT_FALSE(strided.is_contiguous());
  EXPECT_TRUE(at::equal(layer->forward(strided).output, y));
  EXPECT_EQ(layer->forward(at::empty({0, 3, kHidden})).output.sizes(),
            (std::vector<int64_t>{0, 3, kHidden}));
}

/// The gradients that `backward` leaves in the layer and in xs.
template <class Backward>
std::vector<at::Tensor> gradients_after(MoELayer& layer, const std::vector<at::Tensor>& xs,
                                        Backward backward) {
  layer->zero_grad();
  for (at::Tensor x : xs) x.mutable_grad() = at::Tensor();
  backward();
  std::vector<at::Tensor> gradients;
  for (const at::Tensor& x : xs) gradients.push_back(x.grad().clone());
  for (const at::Tensor& parameter : layer->parameters())
    gradients.push_back(parameter.grad().clone());
  return gradients;
}

void expect_near(const std::vector<at::Tensor>& got, const std::vector<at::Tensor>& expected) {
  ASSERT_EQ(got.size(), expected.size());
  for (std::size_t i = 0; i < got.size(); ++i)
    EXPECT_LE(relative_error(got[i], expected[i]), 1e-12) << "gradient " << i;
}

TEST(Layer, SeveralForwardsBeforeTheBackwardsAndAccumulation) {
  MoELayer layer =
      make_layer(small().aux_loss_coeff(0.1), make_expert_groups(world()), at::kDouble);
  const RankInput a = own_input(own(uneven(0)), 1), b = own_input(own(uneven(1)), 2);
  const at::Tensor xa = a.rows.clone().set_requires_grad(true),
                   xb = b.rows.clone().set_requires_grad(true);
  const auto loss = [&](const at::Tensor& x, const at::Tensor& direction) {
    const MoEOutput out = layer->forward(x);
    return (out.output * direction).sum() + out.aux_loss;
  };
  const auto expected = gradients_after(layer, {xa, xb}, [&] {
    loss(xa, a.direction).backward();
    loss(xb, b.direction).backward();
  });
  expect_near(gradients_after(layer, {xa, xb},
                              [&] { (loss(xa, a.direction) + loss(xb, b.direction)).backward(); }),
              expected);
  for (const bool last_first : {false, true}) {
    const auto both = [&] {
      const at::Tensor la = loss(xa, a.direction), lb = loss(xb, b.direction);
      (last_first ? lb : la).backward();
      (last_first ? la : lb).backward();
    };
    expect_near(gradients_after(layer, {xa, xb}, both), expected);
  }
  // One graph through the layer twice.
  const auto twice = [&](MoELayer& l, const at::Tensor& x) {
    return l->forward(l->forward(x).output).output;
  };
  MoELayer alone =
      make_layer(small().aux_loss_coeff(0.1), make_expert_groups(world(), 1), at::kDouble);
  const at::Tensor got = twice(layer, xa), reference = twice(alone, xa);
  EXPECT_LE(relative_error(got, reference), 1e-12);
  const at::Tensor g = torch::autograd::grad({got}, {xa}, {a.direction})[0];
  EXPECT_LE(relative_error(g, torch::autograd::grad({reference}, {xa}, {a.direction})[0]), 1e-12);
}

/// Activation checkpointing: forgets the forward and runs it again in the backward.
class Recompute : public torch::autograd::Function<Recompute> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x,
                            MoELayerImpl* layer) {
    ctx->save_for_backward({x});
    ctx->saved_data["layer"] = reinterpret_cast<int64_t>(layer);
    const at::NoGradGuard no_grad;
    return layer->forward(x).output;
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const at::AutoGradMode with_grad(true);
    const at::Tensor x = ctx->get_saved_variables()[0].detach().set_requires_grad(true);
    reinterpret_cast<MoELayerImpl*>(ctx->saved_data["layer"].toInt())
        ->forward(x)
        .output.backward(grads[0]);
    return {x.grad(), {}};
  }
};

TEST(Layer, Recomputation) {
  for (const double noise : {0.0, 0.3}) {  // drawn again, and the same
    MoELayer layer = make_layer(small().aux_loss_coeff(0.1).logit_noise(noise),
                                make_expert_groups(world()), at::kDouble);
    const RankInput input = own_input(own(uneven(0)));
    const at::Tensor x = input.rows.clone().set_requires_grad(true);
    const auto expected =
        gradients_after(layer, {x}, [&] { layer->forward(x).output.backward(input.direction); });
    const auto got = gradients_after(
        layer, {x}, [&] { Recompute::apply(x, layer.get()).backward(input.direction); });
    expect_near(got, expected);
    const at::NoGradGuard no_grad;
    const at::Tensor in_training = layer->forward(x).output;
    layer->eval();
    EXPECT_EQ(at::equal(layer->forward(x).output, in_training), noise == 0 || x.size(0) == 0);
  }
}

TEST(Layer, CustomExperts) {
  const auto make_expert = [](int64_t e) {
    torch::manual_seed(static_cast<uint64_t>(100 + e));
    return torch::nn::AnyModule(torch::nn::Linear(kHidden, kHidden));
  };
  const MoELayerOptions options = small().top_k(2).custom_expert(make_expert);
  const ExpertGroups groups = make_expert_groups(world());
  MoELayer layer(options, groups);
  layer->to(at::kDouble);
  EXPECT_TRUE(layer->experts.is_empty());
  EXPECT_EQ(layer->expert_parameters().size(), 2U * 8 / static_cast<std::size_t>(world()->size()));

  const std::vector<int64_t> tokens = uneven(0);
  const RankInput input = own_input(own(tokens));
  const LayerRun got = run_layer(layer, input.rows, at::kDouble, input.direction);

  // y = sum of w_e (A_e x + b_e), over all ranks' tokens, each with its direction.
  std::vector<torch::nn::AnyModule> experts;
  std::vector<at::Tensor> leaves;
  for (int64_t e = 0; e < 8; ++e) {
    experts.push_back(make_expert(e));
    experts.back().ptr()->to(at::kDouble);
    for (const at::Tensor& parameter : experts.back().ptr()->parameters())
      leaves.push_back(parameter);
  }
  at::Tensor own_output, own_x, total = at::zeros({}, at::kDouble);
  for (int rank = 0; rank < world()->size(); ++rank) {
    const RankInput in = input_of_rank(rank, tokens[static_cast<std::size_t>(rank)], kHidden);
    const at::Tensor x = in.rows.clone().set_requires_grad(true);
    const auto routing =
        testing::dense_gate(x, layer->gate->weight.detach(), {}, layer->gate->options);
    at::Tensor y = at::zeros_like(x);
    for (int64_t e = 0; e < 8; ++e)
      y = y + (routing.weights * routing.ids.eq(e)).sum(1, true) *
                  (x.mm(leaves[2 * static_cast<std::size_t>(e)].t()) +
                   leaves[2 * static_cast<std::size_t>(e) + 1]);
    total = total + (y * in.direction).sum();
    if (rank == world()->rank()) {
      own_output = y;
      own_x = x;
    }
  }
  leaves.push_back(own_x);
  const auto expected = torch::autograd::grad({total}, leaves);
  EXPECT_LE(relative_error(got.output, own_output), 1e-12);
  EXPECT_LE(relative_error(got.gradients.at("x"), expected.back()), 1e-12);
  const int64_t local = 8 / world()->size();
  for (int64_t e = local * world()->rank(); e < local * (world()->rank() + 1); ++e) {
    const std::string name = "expert_" + std::to_string(e);
    EXPECT_LE(relative_error(got.gradients.at(name + ".weight"),
                             expected[2 * static_cast<std::size_t>(e)]),
              1e-12);
    EXPECT_LE(relative_error(got.gradients.at(name + ".bias"),
                             expected[2 * static_cast<std::size_t>(e) + 1]),
              1e-12);
  }
}

TEST(Layer, RefusesExpertsThatChangeTheShape) {
  MoELayer layer(small().custom_expert([](int64_t) {
    return torch::nn::AnyModule(torch::nn::Linear(kHidden, kHidden + 1));
  }),
                 make_expert_groups(world()));
  expect_error("(must have the same shape)",
               [&] { (void)layer->forward(own_input(5).rows.to(at::kFloat)); });
}

TEST(LayerNumber, LayersWithoutOneAreNotEqual) {
  const ExpertGroups groups = make_expert_groups(world());
  const MoELayerOptions options = MoELayerOptions(16, 32, 8).shared_expert_size(4);
  const auto equal = [](MoELayer& a, MoELayer& b) {
    int64_t count = 0;
    for (const auto& parameter : a->named_parameters())
      count += at::equal(parameter.value(), b->named_parameters()[parameter.key()]) ? 1 : 0;
    return count;
  };
  MoELayer a(options, groups), b(options, groups);
  EXPECT_EQ(equal(a, b), 0);
  EXPECT_EQ(equal(a, a), static_cast<int64_t>(a->parameters().size()));
  EXPECT_FALSE(at::equal(Gate(GateOptions(4, 4))->weight, Gate(GateOptions(4, 4))->weight));
  EXPECT_FALSE(
      at::equal(Experts(ExpertsOptions(4, 4, 4))->w1, Experts(ExpertsOptions(4, 4, 4))->w1));
  // One number for all parts of a layer, that none can be given.
  const int64_t number = a->options.layer().value();
  EXPECT_GE(number, int64_t{1} << 31);
  EXPECT_EQ(a->gate->options.layer(), number);
  EXPECT_EQ(a->experts->options.layer(), number);
  EXPECT_EQ(a->dispatcher().options().layer(), number);
  // The same in every process.
  EXPECT_EQ(all_gather(*world(), number, Purpose::control),
            std::vector<int64_t>(static_cast<std::size_t>(world()->size()), number));
  // A number that is given may repeat; so may that of a layer.
  MoELayer c(MoELayerOptions(options).layer(5), groups),
      d(MoELayerOptions(options).layer(5), groups), copy(a->options, groups);
  EXPECT_EQ(equal(c, d), static_cast<int64_t>(c->parameters().size()));
  EXPECT_EQ(equal(copy, a), static_cast<int64_t>(a->parameters().size()));
  EXPECT_EQ(equal(copy, c), 0);
}

TEST(LayerNumber, IsDrawnOnce) {
  std::vector<std::vector<int64_t>> drawn(4);
  std::vector<std::thread> threads;
  for (auto& numbers : drawn)
    threads.emplace_back([&numbers] {
      for (int i = 0; i < 1000; ++i) numbers.push_back(layer_number(std::nullopt));
    });
  for (std::thread& thread : threads) thread.join();
  std::set<int64_t> different;
  for (const auto& numbers : drawn) different.insert(numbers.begin(), numbers.end());
  EXPECT_EQ(different.size(), 4000U);
  EXPECT_EQ(layer_number(7), 7);
  const int64_t next = *different.rbegin() + 1;  // not drawn yet
  for (const int64_t bad : {int64_t{-1}, next, next + 1000}) {
    expect_error("layer is " + std::to_string(bad) + " (must be 0 .. 2^31 - 1",
                 [&] { static_cast<void>(layer_number(bad)); });
  }
  EXPECT_EQ(layer_number(std::nullopt), next);
}

// Ranks that call two layers in different order do not swap each other's rows unseen, whether the
// layers have numbers or not.
TEST(LayerNumber, OtherOrdersAreRefused) {
  if (world()->size() == 1) GTEST_SKIP() << "needs peers";
  const bool first_rank = world()->rank() == 0;
  const auto name = [](int object) {
    return ", object " + std::to_string(object) + " of the group ";
  };
  for (const auto& layer : {std::optional<int64_t>(), std::optional<int64_t>(3)}) {
    const ExpertGroups groups = make_expert_groups(world());
    const auto options = MoELayerOptions(kHidden, kFfn, 8).layer(layer);
    const at::Tensor x = at::ones({4, kHidden});
    const at::NoGradGuard no_grad;
    const std::string peer = first_rank ? "rank 1" : "rank 0";
    for (const bool equal : {true, false}) {
      const ExpertGroups pair = make_expert_groups(world());
      MoELayer a(options, pair);
      MoELayer b(
          equal ? options : MoELayerOptions(kHidden, kFfn, 16).layer(layer).aux_loss_coeff(0.1),
          pair);
      (void)a->forward(x);
      expect_error<CommError>(peer + " disagrees about the layer of an exchange (layer ",
                              [&] { (void)(first_rank ? a : b)->forward(x); });
    }
    MoELayer d(MoELayerOptions(options).aux_loss_coeff(0.1), groups);
    if (first_rank) d->eval();
    expect_error<CommError>(peer + " disagrees about the world's load (1 = counted: in training " +
                                "with an aux loss) of an exchange (" + (first_rank ? "1" : "0"),
                            [&] { (void)d->forward(x); });
    // A copy is another layer, too; and so is one that some ranks made in between.
    const ExpertGroups others = make_expert_groups(world());
    MoELayer c(options, others);
    if (first_rank) MoELayer between(MoELayerOptions(options).layer(9), others);
    MoELayer copy(c->options, others);
    expect_error<CommError>(name(first_rank ? 2 : 3) + "there, layer ",
                            [&] { (void)copy->forward(x); });
  }
}

TEST(LayerOptions, AreChecked) {
  const auto refused = [](const MoELayerOptions& options, int ep_size, const std::string& text) {
    expect_error<Error>(text, [&] { validate(options, ep_size); });
  };
  EXPECT_NO_THROW(validate(MoELayerOptions(8, 16, 6), 3));
  refused(MoELayerOptions(8, 16, 6), 4,
          "num_experts 6 is not divisible by ep_size 4 (each rank holds the same number of "
          "experts): change one of them");
  refused(MoELayerOptions(0, 16, 4), 1, "hidden_size is 0 (must be at least 1)");
  refused(MoELayerOptions(8, 0, 4), 1, "ffn_hidden_size is 0 (must be at least 1)");
  refused(MoELayerOptions(8, 16, 0), 1, "num_experts is 0");
  refused(MoELayerOptions(8, 16, 4).top_k(5), 1,
          "top_k 5 > num_experts 4 (a token cannot choose an expert twice): lower top_k or add "
          "experts");
  refused(MoELayerOptions(8, 16, 4).activation("tanh"), 1,
          "unknown activation 'tanh': use relu, gelu or swiglu");
  refused(MoELayerOptions(8, 16, 4).score_function("max"), 1,
          "unknown score_function 'max': use softmax or sigmoid");
  refused(MoELayerOptions(8, 16, 4).drop_policy("last"), 1, "unknown drop_policy 'last'");
  refused(MoELayerOptions(8, 16, 4).shared_expert_size(-1), 1, "shared_expert_size is -1");
  refused(MoELayerOptions(8, 16, 4).alignment(0), 1, "alignment is 0");
  refused(MoELayerOptions(8, 16, 4).layer(-1), 1, "layer is -1");
  refused(MoELayerOptions(8, 16, 4).overlap_degree(0), 1, "overlap_degree is 0 (must be 1 to 64)");
  refused(MoELayerOptions(8, 16, 4).overlap_degree(2).codec(CodecOptions().restore("source")), 1,
          "overlap_degree is 2, but restore is source");
  refused(MoELayerOptions(8, 16, 4).overlap_degree(2).custom_expert(
              [](int64_t) { return torch::nn::AnyModule(torch::nn::Linear(8, 8)); }),
          1, "overlap_degree is 2, but the experts are custom ones");
  refused(MoELayerOptions(8, 16, 4).num_groups(3), 1, "num_groups is 3");
  refused(MoELayerOptions(8, 16, 4).num_groups(4).top_k_groups(5), 1, "top_k_groups is 5");
  refused(MoELayerOptions(8, 16, 4).routed_scaling_factor(-1), 1, "routed_scaling_factor is -1");
  refused(MoELayerOptions(8, 16, 4).logit_noise(-1), 1, "logit_noise is -1");
  refused(MoELayerOptions(8, 16, 4).aux_loss_scope("all"), 1, "unknown aux_loss_scope 'all'");
  refused(MoELayerOptions(8, 16, 4).aux_loss_coeff(1).custom_gate(
              [] { return torch::nn::AnyModule(Gate(GateOptions(8, 4))); }),
          1, "aux_loss_coeff is set, but the gate is a custom one");
  refused(MoELayerOptions(8, 16, 4).grouped_gemm("all"), 1, "unknown grouped_gemm 'all'");
  refused(MoELayerOptions(8, 16, 4).codec(CodecOptions().kind("zip")), 1, "zip");
  refused(MoELayerOptions(8, 16, 4).codec(CodecOptions().max_error(-1)), 1, "max_error");
  refused(MoELayerOptions(8, 16, 4).codec_combine(CodecOptions().restore("source")), 1,
          "restore=source is set for combine");
  MoELayer layer(small(), make_expert_groups(world()));
  EXPECT_THROW((void)layer->forward(at::zeros({2, kHidden + 1})), InvalidArgument);
  EXPECT_THROW((void)layer->forward(at::zeros({kHidden})), InvalidArgument);
}

}  // namespace
}  // namespace lshmoe
