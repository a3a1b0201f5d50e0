// The grouped feed-forward node against plain autograd of the same formula, expert by expert.

#include "lshmoe/moe/experts.hpp"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <sstream>

#include "lshmoe/runtime/error.hpp"
#include "tests/support/errors.hpp"

namespace lshmoe {
namespace {

class ExpertsTest : public ::testing::TestWithParam<const char*> {};

TEST_P(ExpertsTest, ForwardAndGradientsEqualPlainAutograd) {
  const std::string activation = GetParam();
  const std::vector<int64_t> rows_per_expert = {3, 0, 5, 1};
  Experts experts(ExpertsOptions(6, 10, 4).activation(activation).seed(3));
  experts->to(at::kDouble);
  at::Tensor x = at::randn({9, 6}, at::kDouble).requires_grad_();
  const at::Tensor direction = at::randn({9, 6}, at::kDouble);

  std::vector<at::Tensor> inputs = {x};
  for (const at::Tensor& parameter : experts->parameters()) inputs.push_back(parameter);
  const at::Tensor y = experts->forward(x, rows_per_expert);
  const auto gradients = torch::autograd::grad({(y * direction).sum()}, inputs);

  std::vector<at::Tensor> blocks;
  int64_t first = 0;
  for (int64_t e = 0; e < 4; ++e) {
    const int64_t n = rows_per_expert[static_cast<std::size_t>(e)];
    const at::Tensor block = x.narrow(0, first, n);
    first += n;
    at::Tensor pre = block.matmul(experts->w1[e].t());
    if (experts->b1.defined()) pre = pre + experts->b1[e];
    at::Tensor hidden = activation == "relu"   ? at::relu(pre)
                        : activation == "gelu" ? at::gelu(pre)
                                               : at::silu(pre) * block.matmul(experts->w3[e].t());
    at::Tensor out = hidden.matmul(experts->w2[e].t());
    if (experts->b2.defined()) out = out + experts->b2[e];
    blocks.push_back(out);
  }
  const at::Tensor expected = at::cat(blocks);
  const auto expected_gradients = torch::autograd::grad({(expected * direction).sum()}, inputs);

  EXPECT_TRUE(at::allclose(y, expected, 1e-12, 1e-12));
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    EXPECT_TRUE(at::allclose(gradients[i], expected_gradients[i], 1e-12, 1e-12)) << "input " << i;
  }
}

INSTANTIATE_TEST_SUITE_P(Activations, ExpertsTest, ::testing::Values("relu", "gelu", "swiglu"));

TEST(Experts, WeightsDependOnTheGlobalIndexOnly) {
  Experts all(ExpertsOptions(4, 8, 6).seed(7).layer(2));
  Experts second_half(ExpertsOptions(4, 8, 3).first_expert(3).seed(7).layer(2));
  EXPECT_TRUE(at::equal(all->w1.narrow(0, 3, 3), second_half->w1));
  EXPECT_TRUE(at::equal(all->b2.narrow(0, 3, 3), second_half->b2));
  Experts other_layer(ExpertsOptions(4, 8, 6).seed(7).layer(3));
  EXPECT_FALSE(at::equal(all->w1, other_layer->w1));
}

TEST(Experts, NoRowsGiveZeroGradients) {
  Experts experts(ExpertsOptions(4, 8, 2));
  const at::Tensor y = experts->forward(at::empty({0, 4}), {0, 0});
  EXPECT_EQ(y.sizes(), (std::vector<int64_t>{0, 4}));
  y.sum().backward();
  EXPECT_TRUE(at::equal(experts->w1.grad(), at::zeros_like(experts->w1)));
}

TEST(Experts, RefusesSecondDerivatives) {
  Experts experts(ExpertsOptions(4, 8, 2));
  const at::Tensor x = at::ones({3, 4}).set_requires_grad(true);
  const at::Tensor y = experts->forward(x, {1, 2});
  EXPECT_THROW((void)torch::autograd::grad({y.sum()}, {x}, {}, true, /*create_graph=*/true),
               InvalidArgument);
  EXPECT_NO_THROW((void)torch::autograd::grad({y.sum()}, {x}));
}

TEST(Experts, RefusesRowsThatDoNotFit) {
  Experts experts(ExpertsOptions(4, 8, 2));
  EXPECT_THROW(experts->forward(at::empty({3, 4}), {1, 1}), InvalidArgument);
  EXPECT_THROW(experts->forward(at::empty({3, 5}), {1, 2}), InvalidArgument);
  EXPECT_THROW(experts->forward(at::empty({3, 4}), {3}), InvalidArgument);
  EXPECT_THROW(Experts(ExpertsOptions(4, 8, 2).activation("tanh")), InvalidArgument);
}

TEST(Experts, RefuseParametersOfAnotherEpSize) {
  for (const char* activation : {"gelu", "swiglu"}) {
    Experts two(ExpertsOptions(4, 8, 2).activation(activation)),
        four(ExpertsOptions(4, 8, 4).activation(activation));
    std::stringstream file;
    torch::save(four, file);
    torch::load(two, file);
    testing::expect_error("the experts' w1 is [4, 8, 4], but this layer's is [2, 8, 4]", [&] {
      (void)two->forward(at::ones({3, 4}), {1, 2});
    });
  }
}

}  // namespace
}  // namespace lshmoe
