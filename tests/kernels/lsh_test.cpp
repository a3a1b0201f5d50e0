// Hashing and clustering against known answers and plain loops in double.

#include "lshmoe/kernels/lsh.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <set>
#include <vector>

#include "lshmoe/kernels/bfloat16.hpp"

namespace lshmoe::kernels {
namespace {

std::vector<float> normal(std::int64_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> draw;
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& value : values) value = draw(random);
  return values;
}
double at(const std::vector<float>& matrix, std::int64_t index) {
  return matrix[static_cast<std::size_t>(index)];
}

TEST(CrossPolytope, KeepsTheSign) {
  const float z[] = {0.5F, -2.0F, 1.5F, 2.0F};
  EXPECT_EQ(cross_polytope_vertex(z, 1), 0U);      // + e_0
  EXPECT_EQ(cross_polytope_vertex(z, 2), 3U);      // - e_1
  EXPECT_EQ(cross_polytope_vertex(z, 4), 3U);      // - e_1: the first of two of size 2
  EXPECT_EQ(cross_polytope_vertex(z + 2, 2), 2U);  // + e_1
  const float flipped[] = {-0.5F, 2.0F, -1.5F, -2.0F};
  EXPECT_EQ(cross_polytope_vertex(flipped, 1), 1U);
  EXPECT_EQ(cross_polytope_vertex(flipped, 4), 2U);
  const float zeros[] = {0.0F, -0.0F, 0.0F};
  EXPECT_EQ(cross_polytope_vertex(zeros, 3), 0U);
}

TEST(CrossPolytope, KeysAreTheVerticesInOrder) {
  // Three hashes of two columns: - e_0, + e_1, + e_0 = 1, 2, 0 in base 4.
  const float z[] = {-3.0F, 1.0F, 0.1F, 0.2F, 5.0F, -4.0F};
  EXPECT_EQ(bucket_key(z, 3, 2), 1U * 16 + 2 * 4 + 0);
  EXPECT_EQ(bucket_key(z, 1, 6), 8U);  // + e_4 of six
  // Sixteen hashes of eight columns fill 64 bits.
  std::vector<float> wide(128, 0.0F);
  for (std::size_t h = 0; h < 16; ++h) wide[8 * h + 7] = -1.0F;
  EXPECT_EQ(bucket_key(wide.data(), 16, 8), ~std::uint64_t{0});

  // Rows further apart than they are wide; columns beyond the hashes are not read.
  const auto rows = normal(5 * 7, 1);
  std::uint64_t keys[5];
  bucket_keys(keys, rows.data(), 5, 7, 3, 2);
  for (int i = 0; i < 5; ++i) EXPECT_EQ(keys[i], bucket_key(rows.data() + 7 * i, 3, 2));
}

TEST(RandomOrthonormal, ColumnsAreOrthonormal) {
  for (const auto& [rows, columns] : {std::pair<std::int64_t, std::int64_t>{1, 1},
                                      {1, 5},
                                      {2, 2},
                                      {3, 8},
                                      {64, 64},
                                      {100, 64},
                                      {48, 64},
                                      {384, 64}}) {
    std::vector<float> r(static_cast<std::size_t>(rows * columns));
    random_orthonormal(r.data(), rows, columns, 5);
    for (std::int64_t a = 0; a < columns; ++a) {
      for (std::int64_t b = 0; b <= a; ++b) {
        // More columns than rows: orthonormal within each run of `rows` columns.
        if (a / rows != b / rows) continue;
        double dot = 0;
        for (std::int64_t i = 0; i < rows; ++i)
          dot += at(r, i * columns + a) * at(r, i * columns + b);
        EXPECT_NEAR(dot, a == b ? 1 : 0, 1e-6) << rows << " x " << columns;
      }
    }
  }
}

// C8: the same bits on every machine and after every restart.
TEST(RandomOrthonormal, BitsAreFixed) {
  float r[12];
  random_orthonormal(r, 4, 3, 42);
  // Made by another program, in another language, from the description in lsh.hpp.
  const std::uint32_t want[12] = {0x3F792C0F, 0xBDA4D4FC, 0xBE5BFD91, 0x3E261D5F,
                                  0xBE103A5D, 0x3F49A86F, 0x3E261D5F, 0x3F1FAE55,
                                  0x3F0053EA, 0x00000000, 0x3F43BCEC, 0xBE92A90B};
  for (int i = 0; i < 12; ++i) EXPECT_EQ(float_bits(r[i]), want[i]) << i;

  float again[12];
  random_orthonormal(again, 4, 3, 42);
  EXPECT_TRUE(std::equal(r, r + 12, again));
  // The first columns do not depend on how many follow.
  float fewer[8];
  random_orthonormal(fewer, 4, 2, 42);
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 2; ++j) EXPECT_EQ(fewer[2 * i + j], r[3 * i + j]);
  }
}

TEST(RandomOrthonormal, SeedsDiffer) {
  std::set<std::vector<float>> seen;
  for (std::uint64_t seed = 0; seed < 50; ++seed) {
    std::vector<float> r(64);
    random_orthonormal(r.data(), 16, 4, seed);
    seen.insert(r);
  }
  EXPECT_EQ(seen.size(), 50U);
}

TEST(GroupByKey, IsStable) {
  const std::uint64_t top = ~std::uint64_t{0};
  const std::uint64_t keys[] = {9, 3, top, 3, 9, 0, 3, top};
  std::int64_t order[8], offsets[9];
  ASSERT_EQ(group_by_key(order, offsets, keys, 8), 4);
  EXPECT_EQ(std::vector<std::int64_t>(order, order + 8),
            (std::vector<std::int64_t>{5, 1, 3, 6, 0, 4, 2, 7}));
  EXPECT_EQ(std::vector<std::int64_t>(offsets, offsets + 5),
            (std::vector<std::int64_t>{0, 1, 4, 6, 8}));
  ASSERT_EQ(group_by_key(order, offsets, keys, 0), 0);
  EXPECT_EQ(offsets[0], 0);

  // Many equal keys: rows of a group stay in row order.
  std::mt19937 random(1);
  std::vector<std::uint64_t> many(1000);
  for (auto& key : many) key = random() % 7;
  std::vector<std::int64_t> sorted(1000), bounds(1001);
  const std::int64_t groups = group_by_key(sorted.data(), bounds.data(), many.data(), 1000);
  ASSERT_EQ(groups, 7);
  for (std::size_t g = 0; g < 7; ++g) {
    std::vector<std::int64_t> want;
    for (std::int64_t i = 0; i < 1000; ++i) {
      if (many[static_cast<std::size_t>(i)] == g) want.push_back(i);
    }
    EXPECT_EQ(std::vector<std::int64_t>(sorted.begin() + bounds[g], sorted.begin() + bounds[g + 1]),
              want);
  }
}

TEST(SegmentMean, EqualsDouble) {
  // Five segments: 40 rows, none, one, three, none; some rows in two or in none.
  const std::int64_t offsets[] = {0, 40, 40, 41, 44, 44}, columns = 19;
  std::mt19937 random(2);
  std::vector<std::int64_t> order(44);
  for (auto& row : order) row = static_cast<std::int64_t>(random() % 50);
  const auto x = normal(50 * columns, 3);
  std::vector<float> out(5 * 19, 77.0F);
  segment_mean(out.data(), x.data(), order.data(), offsets, 5, columns);
  for (std::int64_t s = 0; s < 5; ++s) {
    const std::int64_t members = offsets[s + 1] - offsets[s];
    for (std::int64_t j = 0; j < columns; ++j) {
      double want = 0;
      for (std::int64_t i = offsets[s]; i < offsets[s + 1]; ++i) {
        want +=
            at(x, order[static_cast<std::size_t>(i)] * columns + j) / static_cast<double>(members);
      }
      EXPECT_NEAR(at(out, s * columns + j), want, 1e-6);
    }
  }
  // Summed in the order given: 1e8 first swallows the one, last it does not.
  const float values[] = {1e8F, 1.0F, -1e8F};
  const std::int64_t bounds[] = {0, 3}, first[] = {0, 1, 2}, last[] = {0, 2, 1};
  float mean = 0;
  segment_mean(&mean, values, first, bounds, 1, 1);
  EXPECT_EQ(mean, 0.0F);
  segment_mean(&mean, values, last, bounds, 1, 1);
  EXPECT_NEAR(mean, 1.0 / 3, 1e-6);
}

TEST(NearestCentroid, EqualsDouble) {
  for (const std::int64_t rows : {1, 64, 65, 200}) {
    for (const std::int64_t count : {1, 15, 16, 17, 40}) {
      for (const std::int64_t columns : {1, 24, 64}) {
        const auto z = normal(rows * columns, 1), c = normal(count * columns, 2);
        for (const bool or_none : {false, true}) {
          const auto n = static_cast<std::size_t>(rows);
          std::vector<std::int64_t> nearest(n, 99), without(n);
          std::vector<float> distance(n),
              scratch(static_cast<std::size_t>(nearest_scratch(count, columns)));
          nearest_centroid(nearest.data(), distance.data(), scratch.data(), z.data(), c.data(),
                           rows, count, columns, or_none);
          nearest_centroid(without.data(), nullptr, scratch.data(), z.data(), c.data(), rows, count,
                           columns, or_none);
          EXPECT_EQ(nearest, without);
          for (std::int64_t i = 0; i < rows; ++i) {
            const auto to = [&](std::int64_t k) {
              double sum = 0;
              for (std::int64_t j = 0; j < columns; ++j) {
                const double from = k < 0 ? 0 : at(c, k * columns + j);
                sum += (at(z, i * columns + j) - from) * (at(z, i * columns + j) - from);
              }
              return sum;
            };
            double least = or_none ? to(-1) : std::numeric_limits<double>::infinity();
            for (std::int64_t k = 0; k < count; ++k) least = std::min(least, to(k));
            const std::int64_t got = nearest[static_cast<std::size_t>(i)];
            ASSERT_GE(got, or_none ? -1 : 0);
            ASSERT_LT(got, count);
            // Nearest but for rounding, and the distance is its own.
            const double slack = 1e-5 * (1 + to(-1));
            EXPECT_LE(to(got), least + slack);
            EXPECT_NEAR(at(distance, i), to(got), slack);
            EXPECT_GE(at(distance, i), 0);
          }
        }
      }
    }
  }
}

TEST(NearestCentroid, TiesAndNone) {
  // Centroids 2 and 3 are the same; row 0 is nearest to both, row 1 to the origin, row 2 as near to
  // the origin as to centroid 0, row 3 as near to 0 as to 1.
  const float centroids[] = {2, 0, 2, 2, 0, 5, 0, 5}, z[] = {0, 5, 0.1F, 0, 1, 0, 2, 1};
  std::int64_t nearest[4];
  std::vector<float> scratch(static_cast<std::size_t>(nearest_scratch(4, 2)));
  float distance[4];
  nearest_centroid(nearest, distance, scratch.data(), z, centroids, 4, 4, 2, false);
  EXPECT_EQ(std::vector<std::int64_t>(nearest, nearest + 4),
            (std::vector<std::int64_t>{2, 0, 0, 0}));
  EXPECT_EQ(distance[0], 0.0F);
  nearest_centroid(nearest, distance, scratch.data(), z, centroids, 4, 4, 2, true);
  EXPECT_EQ(std::vector<std::int64_t>(nearest, nearest + 4),
            (std::vector<std::int64_t>{2, -1, -1, 0}));
  EXPECT_FLOAT_EQ(distance[1], 0.01F);
  EXPECT_FLOAT_EQ(distance[2], 1.0F);

  // No centroids at all.
  nearest_centroid(nearest, distance, scratch.data(), z, centroids, 4, 0, 2, false);
  EXPECT_EQ(std::vector<std::int64_t>(nearest, nearest + 4), std::vector<std::int64_t>(4, -1));
  EXPECT_FLOAT_EQ(distance[3], 5.0F);
}

}  // namespace
}  // namespace lshmoe::kernels
