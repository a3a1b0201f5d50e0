// The training loop: bit-equal runs, layouts that change nothing, every option trains.

#include "lshmoe/launch/trainer.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "lshmoe/comm/self/self.hpp"
#include "lshmoe/launch/random.hpp"
#include "lshmoe/runtime/abandon.hpp"
#include "tests/support/main.hpp"

namespace lshmoe::launch {
namespace {

using testing::world;

constexpr int64_t kVocab = 32, kGlobalBatch = 8, kSeqLen = 16;

/// Sequences in which each token follows from the one before; one in eight is random.
class Sequences final : public DataSource {
 public:
  explicit Sequences(int64_t eval_windows = 7) : eval_windows_(eval_windows) {}
  int64_t vocab_size() const override { return kVocab; }
  at::Tensor train_windows(int64_t step, int64_t first, int64_t count) const override {
    return windows(step, first, count);
  }
  int64_t num_eval_windows() const override { return eval_windows_; }
  at::Tensor eval_windows(int64_t first, int64_t count) const override {
    return windows(0, first, count);
  }
  int64_t fingerprint() const override { return 1; }

 private:
  static at::Tensor windows(int64_t step, int64_t first, int64_t count) {
    at::Tensor out = at::empty({count, kSeqLen + 1}, at::kLong);
    for (int64_t i = 0; i < count; ++i) {
      int64_t token = 0;
      for (int64_t t = 0; t <= kSeqLen; ++t) {
        const auto bits = random_bits(static_cast<uint64_t>(step), static_cast<uint64_t>(first + i),
                                      static_cast<uint64_t>(t));
        token = t == 0 || bits % 8 == 0 ? random_below(bits, kVocab) : (5 * token + 3) % kVocab;
        out[i][t] = token;
      }
    }
    return out;
  }
  const int64_t eval_windows_;
};

TrainOptions options(std::vector<const char*> more = {}) {
  TrainOptions made{};
  OptionParser parser("test", "");
  add_train_options(parser, made);
  // Small and fast, unless `more` says otherwise.
  const char* const base[][2] = {{"--hidden-size", "16"},  {"--heads", "2"},
                                 {"--num-experts", "8"},   {"--ffn-hidden-size", "16"},
                                 {"--warmup-steps", "5"},  {"--dense-ffn-hidden-size", "16"},
                                 {"--lr", "0.03"},         {"--steps", "20"},
                                 {"--aux-loss-coeff", "0"}};
  std::vector<const char*> args = {"test"};
  args.insert(args.end(), more.begin(), more.end());
  for (const auto& [name, value] : base) {
    const auto is_name = [name = std::string_view(name)](const char* word) { return word == name; };
    if (std::none_of(more.begin(), more.end(), is_name)) args.insert(args.end(), {name, value});
  }
  EXPECT_TRUE(parser.parse(static_cast<int>(args.size()), args.data(), /*print_help=*/false));
  made.seq_len = kSeqLen;
  return made;
}

/// The global batch shared out among the ranks of `groups`.
Trainer make_trainer(TrainOptions o, const ExpertGroups& groups, const DataSource& data) {
  o.batch_size = kGlobalBatch / groups.world->size();
  validate(o, groups.world->size());
  return Trainer(o, groups, data);
}

struct Course {
  std::vector<StepReport> steps;
  double eval_loss = 0;
};
Course train_steps(const TrainOptions& o, const ExpertGroups& groups, int64_t steps = 20) {
  const Sequences data;
  Trainer trainer = make_trainer(o, groups, data);
  Course run;
  for (int64_t i = 0; i < steps; ++i) run.steps.push_back(trainer.step(/*stop=*/false));
  run.eval_loss = trainer.evaluate();
  return run;
}

void expect_equal_losses(const Course& a, const Course& b, double relative_tolerance) {
  const auto expect_near = [&](double x, double y) {
    EXPECT_LE(std::abs(x - y), relative_tolerance * std::abs(y)) << x << " " << y;
  };
  for (std::size_t i = 0; i < a.steps.size(); ++i) {
    SCOPED_TRACE("step " + std::to_string(i + 1));
    expect_near(a.steps[i].loss, b.steps[i].loss);
    expect_near(a.steps[i].grad_norm, b.steps[i].grad_norm);
  }
  expect_near(a.eval_loss, b.eval_loss);
}

/// Sent by all ranks so far within their expert groups. Collective.
std::int64_t bytes_of(const ExpertGroups& groups, const std::vector<Purpose>& purposes) {
  std::int64_t sum = 0;
  for (const Purpose purpose : purposes) {
    sum += static_cast<std::int64_t>(groups.expert->traffic(purpose).bytes_sent);
  }
  world()->all_reduce(std::span(&sum, 1), ReduceOp::sum, Purpose::control);
  return sum;
}

ExpertGroups alone() { return make_expert_groups(make_self_communicator()); }

TEST(LearningRate, WarmsUpThenFollowsACosine) {
  TrainOptions o = options();
  o.lr = 1.0;
  o.min_lr = 0.2;
  o.warmup_steps = 10;
  o.steps = 110;
  EXPECT_DOUBLE_EQ(learning_rate(o, 1), 0.1);
  EXPECT_DOUBLE_EQ(learning_rate(o, 5), 0.5);
  EXPECT_DOUBLE_EQ(learning_rate(o, 10), 1.0);
  EXPECT_NEAR(learning_rate(o, 35), 0.6 + 0.4 * std::sqrt(0.5), 1e-12);  // a quarter of the way
  EXPECT_NEAR(learning_rate(o, 60), 0.6, 1e-12);
  EXPECT_NEAR(learning_rate(o, 110), 0.2, 1e-12);
  o.warmup_steps = 0;
  EXPECT_LT(learning_rate(o, 1), 1.0);
  EXPECT_GT(learning_rate(o, 1), 0.999);
  o.warmup_steps = o.steps = 10;  // nothing but warm-up
  EXPECT_DOUBLE_EQ(learning_rate(o, 10), 1.0);
}

TEST(Trainer, LayoutChangesNothing) {
  const Course expected = train_steps(options(), alone());
  EXPECT_LT(expected.steps.back().loss, expected.steps.front().loss - 0.7);
  EXPECT_LT(expected.eval_loss, expected.steps.front().loss - 0.7);
  for (int ep_size = 1; ep_size <= world()->size(); ep_size *= 2) {
    SCOPED_TRACE("ep_size " + std::to_string(ep_size));
    const ExpertGroups groups = make_expert_groups(world(), ep_size);
    const Course plain = train_steps(options(), groups);
    expect_equal_losses(plain, expected, 1e-4);
    // A codec that may not err changes not one bit.
    expect_equal_losses(train_steps(options({"--compress", "lsh", "--max-error", "0"}), groups),
                        plain, 0);
    EXPECT_EQ(plain.steps[0].bytes_raw > 0, ep_size > 1);
  }
}

TEST(Trainer, EvaluatesEachWindowOnce) {
  // Numbers that the ranks do not divide, and fewer than there are ranks: some have none.
  for (const int64_t windows : {1, 3, 7, 13}) {
    const Sequences data(windows);
    LanguageModel model(model_options(options(), kVocab), alone());
    double sum = 0;
    for (int64_t w = 0; w < windows; ++w) {
      sum += model->forward(data.eval_windows(w, 1)).loss.item<double>();
    }
    EXPECT_NEAR(make_trainer(options(), make_expert_groups(world()), data).evaluate(),
                sum / static_cast<double>(windows), 1e-5)
        << windows;
  }
}

// AdamW with decoupled weight decay (Loshchilov and Hutter 2019) after clipping by the whole
// gradient's norm, in double.
TEST(Trainer, StepsAreThoseOfAdamW) {
  const TrainOptions o = options({"--weight-decay", "0.3", "--clip-grad", "0.5"});
  const Sequences data;
  Trainer trainer = make_trainer(o, make_expert_groups(world()), data);
  LanguageModel model(model_options(o, kVocab), alone());
  struct State {
    at::Tensor parameter, value, mean, square;
    bool decays;
  };
  std::vector<State> states;
  for (const auto& item : model->named_parameters()) {
    const at::Tensor value = item.value().detach().to(at::kDouble);
    const std::string& name = item.key();
    const bool vector = name.ends_with("norm") || name.ends_with("b1") || name.ends_with("b2");
    states.push_back(
        {item.value(), value.clone(), at::zeros_like(value), at::zeros_like(value), !vector});
  }
  for (int step = 1; step <= 6; ++step) {
    model->zero_grad();
    const at::Tensor loss = model->forward(data.train_windows(step, 0, kGlobalBatch)).loss;
    loss.backward();
    double squared_norm = 0;
    for (const State& s : states) {
      squared_norm += s.parameter.grad().to(at::kDouble).square().sum().item<double>();
    }
    const double norm = std::sqrt(squared_norm);
    const StepReport report = trainer.step(/*stop=*/false);
    EXPECT_NEAR(report.loss, loss.item<double>(), 2e-5) << "step " << step;
    EXPECT_NEAR(report.grad_norm, norm, 1e-3 * norm) << "step " << step;
    EXPECT_GT(norm, 0.5);  // clipping has something to do
    const at::NoGradGuard no_grad;
    for (State& s : states) {
      const at::Tensor gradient = s.parameter.grad().to(at::kDouble) * (0.5 / norm);
      s.mean = 0.9 * s.mean + 0.1 * gradient;
      s.square = 0.95 * s.square + 0.05 * gradient.square();
      const double lr = learning_rate(o, step);
      if (s.decays) s.value = s.value * (1 - lr * 0.3);
      s.value = s.value - lr * (s.mean / (1 - std::pow(0.9, step))) /
                              (at::sqrt(s.square / (1 - std::pow(0.95, step))) + 1e-8);
      s.parameter.copy_(s.value);
    }
  }
}

TEST(Trainer, SameSeedSameBits) {
  const ExpertGroups groups = make_expert_groups(world());
  const std::vector<std::vector<const char*>> cases = {
      {},
      {"--codec-state", "learned"},
      {"--codec-state", "learned", "--transform", "basis"},
      {"--restore", "source", "--estimate-alpha"},
  };
  for (std::vector<const char*> more : cases) {
    SCOPED_TRACE(more.empty() ? "batch" : more.back());
    more.insert(more.end(), {"--compress", "lsh", "--codec-on-self", "--aux-loss-coeff", "0.01"});
    const TrainOptions o = options(more);
    const Course first = train_steps(o, groups), second = train_steps(o, groups);
    expect_equal_losses(first, second, 0);
    for (std::size_t i = 0; i < first.steps.size(); ++i) {
      EXPECT_EQ(first.steps[i].bytes_sent, second.steps[i].bytes_sent);
      EXPECT_EQ(first.steps[i].aux_loss, second.steps[i].aux_loss);
    }
    const bool learned = o.codec_state == "learned";
    EXPECT_EQ(first.steps.back().codec_state_version, learned ? 5 : 0);  // steps 1, 2, 4, 8, 16
    TrainOptions other = o;
    other.seed = 1;
    EXPECT_NE(train_steps(other, groups, 1).steps[0].loss, first.steps[0].loss);
  }
}

TEST(Trainer, RanksHoldEqualStates) {
  const int ep_size = world()->size() == 4 ? 2 : world()->size();  // replicas learn on their own
  const ExpertGroups groups = make_expert_groups(world(), ep_size);
  const Sequences data;
  for (const char* transform : {"channels", "basis"}) {
    Trainer trainer = make_trainer(options({"--compress", "lsh", "--codec-state", "learned",
                                            "--transform", transform, "--codec-on-self"}),
                                   groups, data);
    std::map<Direction, std::uint32_t> last;
    std::int64_t fits = 0;
    for (int step = 1; step <= 8; ++step) {
      (void)trainer.step(/*stop=*/false);
      const bool due = step == 1 || step == 2 || step == 4 || step == 8;
      fits += due ? 1 : 0;
      for (const Direction direction :
           {Direction::dispatch, Direction::combine, Direction::combine_backward,
            Direction::dispatch_backward}) {
        SCOPED_TRACE(::testing::Message()
                     << transform << ", step " << step << ", " << name_of(direction));
        const std::vector<StateStats> layers = trainer.state_stats(direction);
        EXPECT_EQ(layers.size(), 1U);
        const StateStats state = layers.at(0);
        EXPECT_EQ(state.version, fits);
        EXPECT_EQ(state.checksum != last[direction], due);
        last[direction] = state.checksum;
        for (const auto other : all_gather(*groups.expert, state.checksum, Purpose::control))
          EXPECT_EQ(other, state.checksum);
      }
    }
  }
}

TEST(Trainer, ReportsWhatWentOverTheWire) {
  const ExpertGroups groups = make_expert_groups(world());
  const Sequences data;
  Trainer trainer =
      make_trainer(options({"--compress", "lsh", "--max-error", "0.05"}), groups, data);
  const auto exchanged = [&] {
    return bytes_of(groups, {Purpose::plan, Purpose::dispatch, Purpose::combine,
                             Purpose::combine_backward, Purpose::dispatch_backward});
  };
  for (int i = 0; i < 5; ++i) {
    const std::int64_t before = exchanged();
    const StepReport report = trainer.step(/*stop=*/false);
    EXPECT_EQ(static_cast<std::int64_t>(report.bytes_sent), exchanged() - before);
    EXPECT_LE(report.max_relative_error, 0.05 * (1 + 1e-6));
    EXPECT_LE(report.max_error_ratio, 1.0);
    EXPECT_GE(report.expert_load_max_over_mean, 1.0);
    EXPECT_LE(report.expert_load_max_over_mean, 8.0);
    if (world()->size() == 1) {
      EXPECT_EQ(report.bytes_raw, 0);
      continue;
    }
    EXPECT_GT(report.max_relative_error, 0.0);
    EXPECT_GT(report.max_error_ratio, 0.5);
    // Each token goes to 1 .. min(2, ranks - 1) other ranks, or none, there and back, twice: 2
    // bytes an element.
    EXPECT_GT(report.bytes_raw, 0);
    EXPECT_LE(report.bytes_raw, 4.0 * 2 * 16 * kGlobalBatch * kSeqLen * 2);
    EXPECT_EQ(std::fmod(report.bytes_raw, 4.0 * 2 * 16), 0.0);
  }
}

TEST(Trainer, CountsWhatLearnedStateCosts) {
  const ExpertGroups groups = make_expert_groups(world());
  const Sequences data;
  Trainer trainer =
      make_trainer(options({"--compress", "lsh", "--codec-state", "learned"}), groups, data);
  const std::vector<Purpose> exchanges = {Purpose::plan, Purpose::dispatch, Purpose::combine,
                                          Purpose::combine_backward, Purpose::dispatch_backward};
  std::int64_t states_before = 0;
  for (int step = 1; step <= 5; ++step) {
    SCOPED_TRACE(step);
    const std::int64_t before = bytes_of(groups, exchanges);
    const StepReport report = trainer.step(/*stop=*/false);
    const std::int64_t states = bytes_of(groups, {Purpose::codec_state});
    EXPECT_EQ(static_cast<std::int64_t>(report.codec_state_bytes), states - states_before);
    EXPECT_EQ(static_cast<std::int64_t>(report.bytes_sent),
              bytes_of(groups, exchanges) - before + states - states_before);
    states_before = states;
    const bool due = (step == 1 || step == 2 || step == 4) && world()->size() > 1;
    EXPECT_EQ(report.codec_state_bytes > 0, due);
    EXPECT_GE(report.seconds.codec_state, 0.0);
    EXPECT_LE(report.seconds.codec_state, report.seconds.codec);
    // The codebook's floats of four directions, at least: a mean of 16 channels.
    if (world()->size() > 1) {
      EXPECT_GT(report.codec_state_memory, 4 * 4 * 16);
    }
  }
  // The same by the codecs' own account.
  double bytes = 0;
  for (const Direction direction : {Direction::dispatch, Direction::combine,
                                    Direction::combine_backward, Direction::dispatch_backward}) {
    for (const StateStats& state : trainer.state_stats(direction)) {
      bytes += static_cast<double>(state.bytes_sent);
      if (world()->size() > 1) {
        EXPECT_EQ(state.version, 3);
        EXPECT_GT(state.state_bytes, 0);
        EXPECT_GT(state.seconds, 0.0);
      }
    }
  }
  world()->all_reduce(std::span(&bytes, 1), ReduceOp::sum, Purpose::control);
  EXPECT_EQ(static_cast<std::int64_t>(bytes), states_before);
}

// At step 1 all kinds send the same rows; only what a row takes differs.
TEST(Trainer, FormatsSendTheirBytes) {
  const ExpertGroups groups = make_expert_groups(world());
  const auto first_step = [&](const char* kind, const char* rounding) {
    return train_steps(
               options({"--hidden-size", "136", "--compress", kind, "--rounding", rounding}),
               groups, 1)
        .steps[0];
  };
  const StepReport plain = first_step("none", "nearest");
  const double rows = plain.bytes_raw / (2 * 136);
  const std::pair<const char*, int> row_bytes[] = {
      {"fp8", 136 + 2 * 4},       // an fp32 scale per 128 elements
      {"int8", 136 + 4},          // an fp32 scale a row
      {"int4", 136 / 2 + 2 * 2},  // a bf16 scale per 128 elements
  };
  for (const auto& [kind, bytes] : row_bytes) {
    for (const char* rounding : {"nearest", "stochastic"}) {
      const StepReport coded = first_step(kind, rounding);
      EXPECT_EQ(coded.bytes_raw, plain.bytes_raw);
      EXPECT_EQ(plain.bytes_sent - coded.bytes_sent, rows * (4 * 136 - bytes))
          << kind << " " << rounding;
      EXPECT_EQ(coded.max_relative_error > 0, world()->size() > 1);
    }
  }
}

TEST(Trainer, TimesAreParts) {
  const Course run = train_steps(options({"--compress", "lsh"}), make_expert_groups(world()), 3);
  for (const StepReport& report : run.steps) {
    const PhaseSeconds& s = report.seconds;
    for (const double part : {s.experts, s.gradients, s.optimizer}) EXPECT_GT(part, 0.0);
    EXPECT_LE(s.experts + s.codec + s.alltoall + s.gradients + s.optimizer, s.step);
  }
}

TEST(Trainer, GradientIsThatOfTheStep) {
  const Sequences data;
  const auto groups = make_expert_groups(world());
  for (const char* codec : {"none", "lsh"}) {
    Trainer trainer = make_trainer(options({"--compress", codec}), groups, data);
    const Gradient first = trainer.gradient(1), again = trainer.gradient(1);
    const double norm = std::sqrt(trainer.squared_norm(first));
    EXPECT_TRUE(first.shared.equal(again.shared) && first.experts.equal(again.experts));
    const StepReport step = trainer.step(false);  // clips after the norm was taken
    EXPECT_NEAR(norm, step.grad_norm, 1e-6 * norm);
    EXPECT_GT(norm, 0);

    // The same model in another trainer has the same gradient, and had another one before.
    Trainer other = make_trainer(options({"--compress", codec, "--seed", "5"}), groups, data);
    const Gradient here = trainer.gradient(2), before = other.gradient(2);
    EXPECT_FALSE(here.shared.equal(before.shared));
    other.copy_model(trainer);
    if (codec == std::string("none")) {
      EXPECT_TRUE(here.shared.equal(other.gradient(2).shared));
    }
  }
}

TEST(Trainer, OneRanksStopStopsAll) {
  const Sequences data;
  Trainer trainer = make_trainer(options(), make_expert_groups(world()), data);
  EXPECT_FALSE(trainer.step(false).stop);
  EXPECT_TRUE(trainer.step(world()->rank() == world()->size() - 1).stop);
}

TEST(Trainer, CountsParametersOverAllRanks) {
  const Sequences data;
  const int64_t expected = make_trainer(options(), alone(), data).num_parameters();
  for (int ep_size = 1; ep_size <= world()->size(); ep_size *= 2) {
    Trainer trainer = make_trainer(options(), make_expert_groups(world(), ep_size), data);
    EXPECT_EQ(trainer.num_parameters(), expected);
    EXPECT_EQ(trainer.tokens_per_step(), kGlobalBatch * kSeqLen);
  }
}

TEST(Trainer, DivergenceIsSaidByAllRanks) {
  const Sequences data;
  for (const char* codec : {"none", "lsh"}) {
    Trainer trainer = make_trainer(
        options({"--lr", "1e30", "--warmup-steps", "0", "--clip-grad", "0", "--compress", codec}),
        make_expert_groups(world()), data);
    std::string text;
    for (int i = 0; i < 5 && text.empty(); ++i) {
      try {
        (void)trainer.step(false);
      } catch (const NotFinite& error) {
        text = error.what();
      }
    }
    EXPECT_NE(text.find("training diverged): lower --lr"), std::string::npos) << text;
  }
}

/// One of the expert-parallel layouts with and without replicas.
std::vector<int> ep_sizes() {
  const int ranks = world()->size();
  return ranks == 1 ? std::vector<int>{1} : std::vector<int>{ranks, ranks / 2};
}

at::Tensor parameter_named(const Trainer& trainer, const std::string& name) {
  return trainer.model()->named_parameters()[name];
}

std::vector<at::Tensor> copies_of_parameters(const Trainer& trainer) {
  std::vector<at::Tensor> copies;
  for (const at::Tensor& parameter : trainer.model()->parameters()) {
    copies.push_back(parameter.detach().clone());
  }
  return copies;
}

bool equal(const std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](const at::Tensor& x, const at::Tensor& y) { return x.equal(y); });
}

TEST(Trainer, SkipsAStepThatIsNotFiniteOnOneRank) {
  const Sequences data;
  const int last = world()->size() - 1;
  struct Case {
    const char *compress, *poisoned, *says;
  };
  const std::vector<Case> cases = {
      {"lsh", "block1_ffn_norm", "dispatch of layer 1 holds NaN or infinity"},
      {"int8", "block1_moe.experts.w2", "combine of layer 1 holds NaN or infinity"},
      {"none", "block0_qkv", ", first in what block 0 returns"},
      {"none", "block1_ffn_norm", ", first in what block 1 returns"},
      {"bf16", "block1_moe.experts.w2", ", first in what block 1 returns"},
      {"none", "final_norm", ", all blocks return finite values"},
  };
  for (const int ep_size : ep_sizes()) {
    for (const Case& c : cases) {
      SCOPED_TRACE(c.compress + std::string(" ep ") + std::to_string(ep_size));
      Trainer trainer = make_trainer(
          options({"--compress", c.compress, "--skip-nonfinite", "2", "--codec-on-self"}),
          make_expert_groups(world(), ep_size), data);
      for (int i = 0; i < 2; ++i) EXPECT_EQ(trainer.step(false).skipped, "");
      const auto before = copies_of_parameters(trainer);
      const auto poison = [&](double value) {
        if (world()->rank() != last) return;
        const at::NoGradGuard no_grad;
        parameter_named(trainer, c.poisoned).flatten()[3].fill_(value);
      };
      const double healthy = world()->rank() == last
                                 ? parameter_named(trainer, c.poisoned).flatten()[3].item<double>()
                                 : 0;
      // Two in a row, twice: a step between them starts the count anew.
      for (int i = 0; i < 2; ++i) {
        const auto unchanged = copies_of_parameters(trainer);
        poison(std::nan(""));
        for (int j = 0; j < 2; ++j) {
          const StepReport report = trainer.step(false);
          EXPECT_NE(report.skipped.find(c.says), std::string::npos) << report.skipped;
          if (c.says[0] == ',') {
            EXPECT_EQ(report.skipped.find("loss nan on rank "), 0u) << report.skipped;
          }
          EXPECT_FALSE(report.stop);
        }
        poison(healthy);
        if (i == 0) {
          EXPECT_TRUE(equal(copies_of_parameters(trainer), unchanged));
        }
        EXPECT_EQ(trainer.step(false).skipped, "");
      }
      EXPECT_FALSE(equal(copies_of_parameters(trainer), before));
      poison(std::nan(""));
      EXPECT_TRUE(trainer.step(world()->rank() == last).stop);
      EXPECT_NE(trainer.step(false).skipped, "");
      std::string text;
      try {
        (void)trainer.step(false);
      } catch (const NotFinite& error) {
        text = error.what();
      }
      EXPECT_NE(text.find("(training diverged; skipped before it: 2 steps): lower --lr"),
                std::string::npos)
          << text;
    }
  }
}

TEST(Trainer, NamesTheParameterWhoseGradientIsNotFinite) {
  const Sequences data;
  const int last = world()->size() - 1;
  for (const int ep_size : ep_sizes()) {
    for (const std::string name : {"block0_qkv", "block1_moe.experts.w1"}) {
      Trainer trainer = make_trainer(options({"--skip-nonfinite", "1"}),
                                     make_expert_groups(world(), ep_size), data);
      const auto before = copies_of_parameters(trainer);
      unsigned hook = 0;
      if (world()->rank() == last) {
        hook = parameter_named(trainer, name).register_hook([](const at::Tensor& gradient) {
          return gradient * std::numeric_limits<double>::infinity();
        });
      }
      const std::string skipped = trainer.step(false).skipped;
      EXPECT_EQ(skipped,
                "the gradient of " + name + " is not finite on rank " + std::to_string(last));
      EXPECT_TRUE(equal(copies_of_parameters(trainer), before));
      if (world()->rank() == last) parameter_named(trainer, name).remove_hook(hook);
      EXPECT_EQ(trainer.step(false).skipped, "");
    }
  }
}

TEST(Trainer, ASkippedStepMovesNoBias) {
  // The bias update of the step after it counts that step's choices only.
  const Sequences data;
  const std::vector<const char*> sigmoid = {"--score-function",
                                            "sigmoid",
                                            "--expert-bias-rate",
                                            "0.01",
                                            "--skip-nonfinite",
                                            "1",
                                            "--lr",
                                            "1e-30",
                                            "--min-lr",
                                            "0"};
  const auto bias_after_step_2 = [&](bool spoil) {
    Trainer trainer = make_trainer(options(sigmoid), make_expert_groups(world()), data);
    const at::Tensor norm = parameter_named(trainer, "final_norm");
    const at::Tensor healthy = norm.detach().clone();
    {
      const at::NoGradGuard no_grad;
      // Either way step 1 moves no bias: skipped, or its update undone.
      if (spoil) norm.fill_(std::nan(""));
    }
    EXPECT_EQ(trainer.step(false).skipped.empty(), !spoil);
    const at::NoGradGuard no_grad;
    norm.copy_(healthy);
    at::Tensor bias = trainer.model()->named_buffers()["block1_moe.gate.expert_bias"];
    EXPECT_EQ(bias.abs().max().item<double>() == 0, spoil);
    bias.zero_();
    const at::AutoGradMode with_grad(true);
    EXPECT_EQ(trainer.step(false).skipped, "");
    return trainer.model()->named_buffers()["block1_moe.gate.expert_bias"].clone();
  };
  EXPECT_TRUE(bias_after_step_2(true).equal(bias_after_step_2(false)));
}

TEST(Trainer, AStepIsAbandonedOnAllRanks) {
  const Sequences data;
  const bool last = world()->rank() == world()->size() - 1;
  for (const int ep_size : ep_sizes()) {
    for (const char* codec : {"none", "lsh"}) {
      Trainer trainer =
          make_trainer(options({"--compress", codec}), make_expert_groups(world(), ep_size), data);
      EXPECT_FALSE(trainer.step(false).abandoned);
      const auto before = copies_of_parameters(trainer);
      if (last) request_abandon();
      const StepReport report = trainer.step(false);
      EXPECT_TRUE(report.abandoned);
      EXPECT_TRUE(report.stop);
      EXPECT_TRUE(equal(copies_of_parameters(trainer), before));
      EXPECT_THROW((void)trainer.evaluate(), StepAbandoned);
      withdraw_abandon();
      EXPECT_FALSE(trainer.step(false).abandoned);  // nothing is broken by it
    }
  }
}

TEST(Trainer, MicroBatchesGiveTheGradientOfTheWholeBatch) {
  const Sequences data;
  for (const int ep_size : ep_sizes()) {
    const ExpertGroups groups = make_expert_groups(world(), ep_size);
    Trainer whole = make_trainer(options(), groups, data);
    const Gradient expected = whole.gradient(3);
    TrainOptions o = options({"--accumulate", "2"});
    o.batch_size = kGlobalBatch / world()->size() / 2;
    Trainer trainer(o, groups, data);
    EXPECT_EQ(trainer.tokens_per_step(), whole.tokens_per_step());
    const Gradient gradient = trainer.gradient(3);
    for (const auto& [a, b] : {std::pair(gradient.shared, expected.shared),
                               std::pair(gradient.experts, expected.experts)}) {
      EXPECT_GT(b.abs().max().item<double>(), 1e-3);
      EXPECT_LT((a - b).abs().max().item<double>(), 1e-5 * b.abs().max().item<double>());
    }
    for (int i = 0; i < 5; ++i) {
      const StepReport a = trainer.step(false), b = whole.step(false);
      EXPECT_NEAR(a.loss, b.loss, 1e-4 * b.loss);
      EXPECT_EQ(a.bytes_raw, b.bytes_raw);
    }
  }
}

TEST(Trainer, EveryOptionTrains) {
  const std::vector<std::vector<const char*>> cases = {
      {"--score-function", "sigmoid", "--expert-bias-rate", "0.01"},
      {"--capacity-factor", "1", "--compress", "lsh"},
      {"--capacity-factor", "0.75", "--drop-policy", "position"},
      {"--dtype", "bf16", "--compress", "lsh"},
      {"--compress", "bf16"},
      {"--compress", "fp8"},
      {"--compress", "fp8", "--rounding", "stochastic"},
      {"--compress", "int8"},
      {"--compress", "int8", "--rounding-backward", "stochastic"},
      {"--compress", "int4"},
      {"--compress", "int4", "--rounding", "stochastic"},
      {"--compress", "lsh", "--codec-state", "learned"},
      {"--compress", "lsh", "--codec-state", "learned", "--transform", "basis"},
      {"--compress", "lsh", "--restore", "source"},
      {"--compress", "lsh", "--restore", "source", "--refine", "0", "--estimate-alpha"},
      {"--compress", "lsh", "--compress-backward", "bf16", "--error-reference", "group"},
      {"--compress", "lsh", "--max-clusters", "0", "--max-error-backward", "0.3"},
      {"--compress", "lsh", "--codec-on-self"},
      {"--activation", "swiglu"},
      {"--activation", "relu", "--moe-every", "1", "--z-loss-coeff", "0.001"},
      {"--accumulate", "3", "--compress", "lsh", "--codec-state", "learned"},
      {"--shared-expert-size", "8", "--top-k", "1", "--aux-loss-coeff", "0.01"},
  };
  const int ep_size = world()->size() == 4 ? 2 : world()->size();  // replicas too
  const ExpertGroups groups = make_expert_groups(world(), ep_size);
  for (const auto& more : cases) {
    std::string name;
    for (const char* word : more) name += std::string(" ") + word;
    SCOPED_TRACE(name);
    const Course run = train_steps(options(more), groups);
    EXPECT_NEAR(run.steps.front().loss, std::log(double{kVocab}), 0.3);
    EXPECT_LT(run.steps.back().loss, run.steps.front().loss - 0.7);
    EXPECT_LT(run.eval_loss, run.steps.front().loss - 0.7);
  }
}

}  // namespace
}  // namespace lshmoe::launch
