// Products: right, and of the same bits in any company.

#include "lshmoe/kernels/packed_matrix.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <random>
#include <vector>

namespace lshmoe::kernels {
namespace {

std::vector<float> normal(std::int64_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> draw;
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& value : values) value = draw(random);
  return values;
}
float at(const std::vector<float>& values, std::int64_t i) {
  return values[static_cast<std::size_t>(i)];
}

// One running sum an element, from the first product to the last.
std::vector<float> running_sums(const std::vector<float>& x, const std::vector<float>& matrix,
                                std::int64_t rows, std::int64_t inner, std::int64_t columns) {
  std::vector<float> out;
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t j = 0; j < columns; ++j) {
      float sum = 0;
      for (std::int64_t k = 0; k < inner; ++k) {
        const float product = at(x, i * inner + k) * at(matrix, k * columns + j);
        sum += product;
      }
      out.push_back(sum);
    }
  }
  return out;
}

// Sizes on both sides of every block, tile and panel.
TEST(PackedMatrix, GivesRunningSums) {
  for (const std::int64_t rows : {0, 1, 3, 4, 9, 201}) {
    for (const std::int64_t inner : {0, 1, 100, 256, 515}) {
      for (const std::int64_t columns : {1, 15, 16, 17, 40}) {
        const auto x = normal(rows * inner, 1), m = normal(inner * columns, 2);
        const PackedMatrix matrix(m.data(), inner, columns);
        EXPECT_EQ(matrix.inner(), inner);
        EXPECT_EQ(matrix.columns(), columns);
        std::vector<float> out(static_cast<std::size_t>(rows * columns) + 1, 77.0F);
        matrix.multiply(out.data(), x.data(), rows);
        EXPECT_EQ(out.back(), 77.0F);
        out.pop_back();
        EXPECT_EQ(out, running_sums(x, m, rows, inner, columns))
            << rows << " " << inner << " " << columns;
      }
    }
  }
}

TEST(PackedMatrix, OfNothing) {
  const PackedMatrix matrix;
  EXPECT_EQ(matrix.columns(), 0);
  matrix.multiply(nullptr, nullptr, 3);
}

TEST(Multiply, PacksAndMultiplies) {
  const auto x = normal(7 * 33, 1), m = normal(33 * 19, 2);
  std::vector<float> out(7 * 19);
  multiply(out.data(), x.data(), m.data(), 7, 33, 19);
  EXPECT_EQ(out, running_sums(x, m, 7, 33, 19));
}

}  // namespace
}  // namespace lshmoe::kernels
