// The language model against its formulas in double, causality, and the same model in any layout.

#include "lshmoe/launch/language_model.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <string>
#include <vector>

#include "lshmoe/comm/self/self.hpp"
#include "lshmoe/runtime/error.hpp"
#include "tests/support/main.hpp"

namespace lshmoe::launch {
namespace {

using testing::world;

constexpr int64_t kVocab = 17, kHidden = 16, kFfn = 6, kDenseFfn = 12, kExperts = 8, kHeads = 2;

LanguageModelOptions options(int64_t vocab = kVocab) {
  return LanguageModelOptions(vocab, MoELayerOptions(kHidden, kFfn, kExperts))
      .layers(4)
      .moe_every(2)
      .heads(kHeads)
      .dense_ffn_hidden_size(kDenseFfn)
      .seed(5);
}

ExpertGroups alone() { return make_expert_groups(make_self_communicator()); }

at::Tensor random_tokens(at::IntArrayRef sizes, int64_t vocab = kVocab, uint64_t seed = 1) {
  at::Generator stream = at::make_generator<at::CPUGeneratorImpl>(seed);
  return at::randint(vocab, sizes, stream, at::kLong);
}

std::map<std::string, at::Tensor> parameters_of(const LanguageModel& model) {
  std::map<std::string, at::Tensor> all;
  for (const auto& parameter : model->named_parameters()) all[parameter.key()] = parameter.value();
  return all;
}

// One sequence [length], everything in double but the MoE layer, which has its own tests.
class Formulas {
 public:
  explicit Formulas(const LanguageModel& model) : model_(model) {
    for (const auto& [name, value] : parameters_of(model)) {
      parameters_[name] = value.detach().to(at::kDouble);
    }
  }

  at::Tensor logits(const at::Tensor& tokens) {
    const int64_t length = tokens.size(0);
    std::vector<at::Tensor> x;  // [length] of [hidden]
    for (int64_t t = 0; t < length; ++t) x.push_back(p("embedding")[tokens[t].item<int64_t>()]);
    for (int64_t b = 0; b < model_->options.layers(); ++b) {
      const std::string block = "block" + std::to_string(b) + "_";
      const auto attended = attention(x, block);
      for (int64_t t = 0; t < length; ++t) x[t] = x[t] + attended[t];
      std::vector<at::Tensor> in;
      for (const at::Tensor& row : x) in.push_back(norm(row, block + "ffn_norm"));
      at::Tensor moe;
      if (b % 2 == 1) moe = this->moe(block, at::stack(in));
      for (int64_t t = 0; t < length; ++t) {
        x[t] = x[t] +
               (b % 2 == 1 ? moe[t] : p(block + "ffn_out").mv(gelu(p(block + "ffn_in").mv(in[t]))));
      }
    }
    std::vector<at::Tensor> rows;
    for (const at::Tensor& row : x) rows.push_back(p("embedding").mv(norm(row, "final_norm")));
    return at::stack(rows);
  }

 private:
  const at::Tensor& p(const std::string& name) const { return parameters_.at(name); }

  at::Tensor norm(const at::Tensor& row, const std::string& weight) const {
    const at::Tensor centered = row - row.mean();
    return centered / at::sqrt(centered.square().mean() + 1e-5) * p(weight);
  }
  static at::Tensor gelu(const at::Tensor& x) {
    return 0.5 * x * (1 + at::erf(x / std::sqrt(2.0)));
  }

  // Channels (2i, 2i + 1) of a head, turned by t * 10000^(-2i / head_dim).
  static at::Tensor rotated(const at::Tensor& head, int64_t t) {
    at::Tensor out = head.clone();
    const int64_t dim = head.size(0);
    for (int64_t i = 0; i < dim; i += 2) {
      const double angle = static_cast<double>(t) *
                           std::pow(10000.0, -static_cast<double>(i) / static_cast<double>(dim));
      out[i] = head[i] * std::cos(angle) - head[i + 1] * std::sin(angle);
      out[i + 1] = head[i] * std::sin(angle) + head[i + 1] * std::cos(angle);
    }
    return out;
  }

  std::vector<at::Tensor> attention(const std::vector<at::Tensor>& x, const std::string& block) {
    const int64_t dim = kHidden / kHeads;
    std::vector<at::Tensor> qkv, out;
    for (const at::Tensor& row : x) {
      qkv.push_back(p(block + "qkv").mv(norm(row, block + "attention_norm")));
    }
    for (std::size_t t = 0; t < x.size(); ++t) {
      std::vector<at::Tensor> heads;
      for (int64_t h = 0; h < kHeads; ++h) {
        const auto part = [&](std::size_t at, int64_t which) {
          return qkv[at].narrow(0, which * kHidden + h * dim, dim);
        };
        const at::Tensor q = rotated(part(t, 0), static_cast<int64_t>(t));
        at::Tensor sum = at::zeros({dim}, at::kDouble);
        double total = 0;
        for (std::size_t s = 0; s <= t; ++s) {
          const at::Tensor k = rotated(part(s, 1), static_cast<int64_t>(s));
          const double weight =
              std::exp(q.dot(k).item<double>() / std::sqrt(static_cast<double>(dim)));
          sum += weight * part(s, 2);
          total += weight;
        }
        heads.push_back(sum / total);
      }
      out.push_back(p(block + "attention_out").mv(at::cat(heads)));
    }
    return out;
  }

  at::Tensor moe(const std::string& block, const at::Tensor& rows) {
    const auto layer =
        std::dynamic_pointer_cast<MoELayerImpl>(model_->named_modules()[block + "moe"]);
    return layer->forward(rows.to(at::kFloat)).output.to(at::kDouble);
  }

  LanguageModel model_;
  std::map<std::string, at::Tensor> parameters_;
};

at::Tensor logits_of(LanguageModel& model, const at::Tensor& tokens) {
  const at::NoGradGuard no_grad;
  LanguageModelOutput out;
  return model->logits(tokens, out);
}

double largest(const at::Tensor& difference) { return difference.abs().max().item<double>(); }

TEST(LanguageModel, LogitsAndLossAreThoseOfTheFormulas) {
  const at::NoGradGuard no_grad;
  LanguageModel model(options(), alone());
  // Weights at which attention and norms matter: at the start all scores are nearly equal.
  for (at::Tensor& parameter : model->parameters()) {
    parameter.mul_(3).add_(parameter.dim() == 1 ? 0.2 * at::rand_like(parameter)
                                                : at::zeros_like(parameter));
  }
  const at::Tensor windows = random_tokens({2, 8});
  const at::Tensor logits = logits_of(model, windows.narrow(1, 0, 7));
  ASSERT_EQ(logits.sizes(), (std::vector<int64_t>{2, 7, kVocab}));
  Formulas formulas(model);
  double nats = 0;
  for (int64_t b = 0; b < 2; ++b) {
    const at::Tensor expected = formulas.logits(windows[b].narrow(0, 0, 7));
    EXPECT_GT(largest(expected), 0.5);
    // The worst of LSHMOE_TEST_SEED=1 ... 1000 was 2.9e-5.
    EXPECT_LT(largest(logits[b].to(at::kDouble) - expected), 1e-4);
    for (int64_t t = 0; t < 7; ++t) {
      const at::Tensor row = expected[t];
      nats += at::log(at::exp(row).sum()).item<double>() -
              row[windows[b][t + 1].item<int64_t>()].item<double>();
    }
  }
  EXPECT_NEAR(model->forward(windows).loss.item<double>(), nats / 14, 1e-5);
}

TEST(LanguageModel, ALaterTokenChangesNoEarlierLogit) {
  LanguageModel model(options(), make_expert_groups(world()));
  const at::Tensor tokens = random_tokens({2, 12}, kVocab, 1 + world()->rank());
  const at::Tensor before = logits_of(model, tokens);
  for (const int64_t changed : {0, 5, 11}) {
    at::Tensor other = tokens.clone();
    other[0][changed] = (other[0][changed] + 1) % kVocab;
    const at::Tensor difference = (logits_of(model, other) - before).abs().amax(2);
    for (int64_t t = 0; t < changed; ++t) EXPECT_LT(difference[0][t].item<double>(), 1e-6) << t;
    for (int64_t t = changed; t < 12; ++t) EXPECT_GT(difference[0][t].item<double>(), 1e-6) << t;
    EXPECT_LT(largest(difference[1]), 1e-6);
  }
}

TEST(LanguageModel, KnowsNothingAtTheStart) {
  LanguageModel model(options(256), make_expert_groups(world()));
  const at::NoGradGuard no_grad;
  const double loss =
      model->forward(random_tokens({4, 33}, 256, 1 + world()->rank())).loss.item<double>();
  EXPECT_NEAR(loss, std::log(256.0), 0.1);
}

TEST(LanguageModel, NumberOfParameters) {
  LanguageModel model(options(), alone());
  int64_t count = 0;
  for (const at::Tensor& parameter : model->parameters()) count += parameter.numel();
  const int64_t attention = 2 * kHidden + 4 * kHidden * kHidden;  // two norms, q, k, v, output
  const int64_t dense = 2 * kHidden * kDenseFfn;
  const int64_t moe = kExperts * (kHidden + 2 * kHidden * kFfn + kFfn + kHidden);
  EXPECT_EQ(count, kVocab * kHidden + 4 * attention + 2 * dense + 2 * moe + kHidden);
}

TEST(LanguageModel, SameModelAtAnyEpSize) {
  LanguageModel whole(options(), alone());
  const auto expected = parameters_of(whole);
  const at::Tensor windows = random_tokens({3, 9});
  const double loss = whole->forward(windows).loss.item<double>();
  for (int ep_size = 1; ep_size <= world()->size(); ep_size *= 2) {
    const ExpertGroups groups = make_expert_groups(world(), ep_size);
    LanguageModel model(options(), groups);
    const auto parameters = parameters_of(model);
    EXPECT_EQ(parameters.size(), expected.size());
    for (const auto& [name, value] : parameters) {
      const bool expert = name.find("moe.experts.") != std::string::npos;
      const int64_t local = kExperts / ep_size;
      EXPECT_TRUE(at::equal(
          value, expert ? expected.at(name).narrow(0, groups.expert->rank() * local, local)
                        : expected.at(name)))
          << name << " at ep_size " << ep_size;
    }
    EXPECT_NEAR(model->forward(windows).loss.item<double>(), loss, 1e-5);
  }
  LanguageModel other(options().seed(6), alone());
  EXPECT_FALSE(at::equal(parameters_of(other).at("embedding"), expected.at("embedding")));
  EXPECT_FALSE(at::equal(expected.at("block0_qkv"), expected.at("block1_qkv")));
}

TEST(LanguageModel, ComputesInBfloat16WithWeightsInFloat) {
  const ExpertGroups groups = make_expert_groups(world());
  LanguageModel single(options(), groups), half(options().dtype(at::kBFloat16), groups);
  const at::Tensor tokens = random_tokens({2, 12}, kVocab, 1 + world()->rank());
  const at::Tensor a = logits_of(single, tokens), b = logits_of(half, tokens);
  EXPECT_EQ(b.scalar_type(), at::kFloat);
  EXPECT_GT(largest(a - b), 0.0);
  // On the whole: a token whose experts are nearly tied may be routed otherwise.
  EXPECT_LT((a - b).abs().median().item<double>(), 0.03 * a.abs().median().item<double>());
  for (const auto& [name, value] : parameters_of(half)) {
    EXPECT_EQ(value.scalar_type(), at::kFloat) << name;
  }
}

TEST(LanguageModel, SaysWhatDoesNotFit) {
  const auto error_of = [](const LanguageModelOptions& bad) -> std::string {
    try {
      validate(bad, 1);
    } catch (const InvalidArgument& error) {
      return error.what();
    }
    return "no error";
  };
  const auto has = [](const std::string& text, const char* part) {
    return text.find(part) != std::string::npos;
  };
  EXPECT_EQ(error_of(options()), "no error");
  EXPECT_TRUE(has(error_of(options().heads(3)), "hidden-size 16 is not divisible by 2 x heads 3"));
  EXPECT_TRUE(has(error_of(options().heads(0)), "heads is 0"));
  EXPECT_TRUE(has(error_of(options().layers(0)), "layers is 0"));
  EXPECT_TRUE(has(error_of(options().layers(99999999999)), "layers is 99999999999"));
  EXPECT_TRUE(has(error_of(options().moe_every(5)), "moe-every is 5"));
  EXPECT_TRUE(has(error_of(options().dense_ffn_hidden_size(0)), "dense-ffn-hidden-size is 0"));
  EXPECT_TRUE(has(error_of(options().dtype(at::kDouble)), "dtype"));
}

}  // namespace
}  // namespace lshmoe::launch
