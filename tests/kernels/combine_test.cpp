// Segment sums against plain loops in double.

#include "lshmoe/kernels/combine.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "lshmoe/kernels/bfloat16.hpp"

namespace lshmoe::kernels {
namespace {

// Four segments: three rows, none, one row, two rows; row 4 is in none.
const std::vector<std::int64_t> kOffset{0, 3, 3, 4, 6}, kIndex{5, 0, 2, 6, 3, 1};
constexpr std::int64_t kRows = 7, kSegments = 4;

struct F32 {
  using Row = float;
  using Weight = float;
  static constexpr RowType type = RowType::f32;
  static constexpr double tolerance = 1e-5;
  static Row make(double v) { return static_cast<float>(v); }
  static double value(Row v) { return v; }
};
struct Bf16 {
  using Row = Bfloat16;
  using Weight = float;
  static constexpr RowType type = RowType::bf16;
  static constexpr double tolerance = 1e-2;
  static Row make(double v) { return to_bfloat16(static_cast<float>(v)); }
  static double value(Row v) { return to_float(v); }
};
struct F64 {
  using Row = double;
  using Weight = double;
  static constexpr RowType type = RowType::f64;
  static constexpr double tolerance = 1e-13;
  static Row make(double v) { return v; }
  static double value(Row v) { return v; }
};

template <class Types>
class Combine : public ::testing::Test {
 protected:
  using Row = typename Types::Row;
  using Weight = typename Types::Weight;

  std::vector<Row> rows(std::int64_t count, std::int64_t hidden) {
    std::vector<Row> out(static_cast<std::size_t>(count * hidden));
    for (Row& v : out) v = Types::make(normal_(random_));
    return out;
  }
  std::vector<Weight> weights() {
    std::vector<Weight> out(kRows);
    for (Weight& v : out) v = static_cast<Weight>(normal_(random_));
    return out;
  }
  void expect_near(double got, double want) {
    EXPECT_NEAR(got, want, Types::tolerance * (1 + std::abs(want)));
  }

 private:
  std::mt19937 random_{7};
  std::normal_distribution<double> normal_;
};
using AllTypes = ::testing::Types<F32, Bf16, F64>;
TYPED_TEST_SUITE(Combine, AllTypes);

// Narrower and wider than a block of columns, and no multiple of a vector.
constexpr std::int64_t kWidths[] = {1, 5, 32, 300, 517};

TYPED_TEST(Combine, SumsSegments) {
  for (const std::int64_t hidden : kWidths) {
    const auto in = this->rows(kRows, hidden);
    const auto weight = this->weights();
    for (const bool weighted : {true, false}) {
      auto out = this->rows(kSegments, hidden);  // must be overwritten
      segment_sum(TypeParam::type, out.data(), in.data(), hidden, kOffset.data(), kSegments,
                  kIndex.data(), weighted ? weight.data() : nullptr);
      for (std::int64_t s = 0; s < kSegments; ++s) {
        for (std::int64_t c = 0; c < hidden; ++c) {
          double want = 0;
          for (std::int64_t j = kOffset[static_cast<std::size_t>(s)];
               j < kOffset[static_cast<std::size_t>(s) + 1]; ++j) {
            const auto r = static_cast<std::size_t>(kIndex[static_cast<std::size_t>(j)]);
            want += (weighted ? static_cast<double>(weight[r]) : 1.0) *
                    TypeParam::value(
                        in[r * static_cast<std::size_t>(hidden) + static_cast<std::size_t>(c)]);
          }
          this->expect_near(TypeParam::value(out[static_cast<std::size_t>(s * hidden + c)]), want);
        }
      }
    }
  }
}

TYPED_TEST(Combine, Backward) {
  for (const std::int64_t hidden : kWidths) {
    const auto in = this->rows(kRows, hidden), grad = this->rows(kSegments, hidden);
    const auto weight = this->weights();
    std::vector<typename TypeParam::Row> grad_in(in.size(), TypeParam::make(77));
    std::vector<typename TypeParam::Weight> grad_weight(kRows, 77);
    segment_sum_backward(TypeParam::type, grad_in.data(), grad_weight.data(), grad.data(),
                         in.data(), hidden, kOffset.data(), kSegments, kIndex.data(),
                         weight.data());
    const auto h = static_cast<std::size_t>(hidden);
    for (std::size_t s = 0; s < kSegments; ++s) {
      for (auto j = static_cast<std::size_t>(kOffset[s]);
           j < static_cast<std::size_t>(kOffset[s + 1]); ++j) {
        const auto r = static_cast<std::size_t>(kIndex[j]);
        double dot = 0;
        for (std::size_t c = 0; c < h; ++c) {
          const double g = TypeParam::value(grad[s * h + c]);
          dot += g * TypeParam::value(in[r * h + c]);
          this->expect_near(TypeParam::value(grad_in[r * h + c]),
                            g * static_cast<double>(weight[r]));
        }
        this->expect_near(static_cast<double>(grad_weight[r]), dot);
      }
    }
    // Row 4 is named by no segment.
    EXPECT_EQ(grad_weight[4], 77);
    EXPECT_EQ(TypeParam::value(grad_in[4 * h]), 77);
  }
}

}  // namespace
}  // namespace lshmoe::kernels
