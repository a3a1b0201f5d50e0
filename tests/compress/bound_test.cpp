// The bound of kind lsh, for rows of every size and nature: no row's error, computed in double, is
// beyond it.
//
//   LSHMOE_SLOW_TESTS=1   a learned basis at hidden size 4096, too (its fit takes minutes)

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>

#include "lshmoe/comm/self/self.hpp"
#include "lshmoe/compress/codec.hpp"
#include "lshmoe/runtime/error.hpp"
#include "tests/compress/rows.hpp"

namespace lshmoe {
namespace {

struct Case {
  int64_t hidden;
  at::ScalarType dtype;
  std::string reference, state, transform;
  double max_error;
  std::string rounding;

  [[nodiscard]] std::string name() const {
    return detail::message("hidden ", hidden, ", ", dtype, ", reference ", reference, ", ", state,
                           " ", transform, ", ", max_error, " ", rounding);
  }
};

/// Largest error over its bound; the rows of a group are `rows_per_group` in order.
double largest_ratio(const Case& c, const at::Tensor& x, const at::Tensor& decoded,
                     const std::vector<int64_t>& rows_per_group) {
  const at::Tensor error = (decoded.to(at::kDouble) - x.to(at::kDouble)).square().sum(1).sqrt();
  const at::Tensor reference = testing::references(x, rows_per_group, c.reference == "group");
  // A zero row comes back zero: 0 / 0 counts as kept. NaN does not.
  const at::Tensor ratio =
      at::where(error == 0, at::zeros_like(error), error / (c.max_error * reference));
  return at::isfinite(ratio).all().item<bool>() ? ratio.max().item<double>() : INFINITY;
}

void check(const Case& c) {
  SCOPED_TRACE(c.name());
  const CodecOptions options = CodecOptions()
                                   .state(c.state)
                                   .transform(c.transform)
                                   .force_basis(true)
                                   .error_reference(c.reference)
                                   .max_error(c.max_error)
                                   .rounding(c.rounding)
                                   .codebook_size(32)
                                   .sample_rows(4 * c.hidden + 300);
  const auto codec = make_codec(options, {c.hidden, 0, Direction::dispatch, c.dtype});
  if (c.state == "learned") {
    const int64_t rows = c.transform == "basis" ? 4 * c.hidden + 300 : 300;
    codec->observe(testing::clustered(rows, c.hidden, 10, 0.3, 1).to(c.dtype), {});
    ASSERT_TRUE(codec->refresh(*make_self_communicator()));
  }
  const int64_t rows = c.hidden <= 100 ? 240 : c.hidden <= 1000 ? 90 : 18;
  const std::vector<int64_t> groups{rows / 3, rows - rows / 3};
  for (const std::string& kind : testing::row_kinds()) {
    const at::Tensor x = testing::make_rows(kind, rows, c.hidden, 2).to(c.dtype);
    const Encoded encoded = codec->encode(x, groups);
    const Decoded decoded = codec->decode(encoded.bytes, encoded.bytes_per_group);
    ASSERT_EQ(decoded.rows_per_group, groups);
    const double ratio = largest_ratio(c, x, decoded.rows, groups);
    EXPECT_LE(ratio, 1.0) << kind;
    // What the sender says of itself is no less than what is so.
    EXPECT_LE(encoded.stats.max_error_ratio, 1.0) << kind;
    EXPECT_GE(encoded.stats.max_error_ratio, ratio * (1 - 1e-6)) << kind;
    // One row alone.
    const at::Tensor one = x.slice(0, rows / 2, rows / 2 + 1);
    const Encoded alone = codec->encode(one, {0, 1});
    const at::Tensor back = codec->decode(alone.bytes, alone.bytes_per_group).rows;
    EXPECT_LE(largest_ratio(c, one, back, {0, 1}), 1.0) << kind;
  }
}

void check_all(int64_t hidden, const std::string& state, const std::string& transform) {
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    for (const char* reference : {"row", "group"}) {
      check({hidden, dtype, reference, state, transform, 0.1, "nearest"});
      if (hidden > 384) continue;  // fits take seconds
      check({hidden, dtype, reference, state, transform, 0.02, "dithered"});
      check({hidden, dtype, reference, state, transform, 0.005, "nearest"});
      check({hidden, dtype, reference, state, transform, 0.7, "dithered"});
    }
  }
}

class Bound : public ::testing::TestWithParam<int64_t> {};

TEST_P(Bound, Batch) { check_all(GetParam(), "batch", "channels"); }
TEST_P(Bound, LearnedChannels) { check_all(GetParam(), "learned", "channels"); }
TEST_P(Bound, LearnedBasis) {
  if (GetParam() < 4096) {
    check_all(GetParam(), "learned", "basis");
  } else if (std::getenv("LSHMOE_SLOW_TESTS") != nullptr) {
    check({4096, at::kFloat, "row", "learned", "basis", 0.1, "nearest"});
    check({4096, at::kBFloat16, "group", "learned", "basis", 0.1, "nearest"});
  } else {
    GTEST_SKIP() << "set LSHMOE_SLOW_TESTS=1";
  }
}

INSTANTIATE_TEST_SUITE_P(Hidden, Bound, ::testing::Values(1, 7, 16, 64, 100, 384, 1000, 4096));

// The formula by hand: norms 1, 2 and 100, of which 2 is the median.
TEST(BoundTest, ReferencesAreCutOffAtThreeMedians) {
  at::Tensor x = at::zeros({5, 4});
  x[0][0] = 2;
  x[1][1] = 100;
  x[3][2] = -1;
  const double group = std::sqrt((2 * 2 + 6 * 6) / 2.0);
  EXPECT_TRUE(at::allclose(testing::references(x, {3, 2}, false),
                           at::tensor({2.0, 6.0, 0.0, 1.0, 0.0}, at::kDouble)));
  EXPECT_TRUE(at::allclose(testing::references(x, {3, 2}, true),
                           at::tensor({group, group, group, 1.0, 1.0}, at::kDouble)));
}

// The test of the test: an error beyond the bound is seen, in the group where it is.
TEST(BoundTest, SeesARowBeyondItsBound) {
  const Case c{4, at::kFloat, "group", "batch", "channels", 0.1, "nearest"};
  const at::Tensor x = at::ones({4, 4});
  at::Tensor decoded = x.clone();
  EXPECT_EQ(largest_ratio(c, x, decoded, {2, 2}), 0);
  decoded[3][0] = 1.21F;
  EXPECT_GT(largest_ratio(c, x, decoded, {2, 2}), 1);
  decoded[3][0] = 1.19F;
  EXPECT_LT(largest_ratio(c, x, decoded, {2, 2}), 1);
  decoded[3][0] = NAN;
  EXPECT_GT(largest_ratio(c, x, decoded, {2, 2}), 1);
}

}  // namespace
}  // namespace lshmoe
