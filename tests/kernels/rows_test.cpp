// Picking, scattering and converting rows, and the checksum of parcels.

#include "lshmoe/kernels/rows.hpp"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "lshmoe/kernels/checksum.hpp"

namespace lshmoe::kernels {
namespace {

TEST(Rows, GatherAndScatter) {
  for (const std::size_t row_bytes : {1, 3, 8, 100}) {
    std::vector<std::uint8_t> in(5 * row_bytes);
    for (std::size_t i = 0; i < in.size(); ++i) in[i] = static_cast<std::uint8_t>(i * 7 + 1);
    const std::int64_t index[] = {4, 0, 0, 2};
    std::vector<std::uint8_t> out(4 * row_bytes + 1, 250);
    gather_rows(out.data(), in.data(), index, 4, row_bytes);
    for (std::size_t i = 0; i < 4; ++i) {
      EXPECT_EQ(std::memcmp(&out[i * row_bytes],
                            &in[static_cast<std::size_t>(index[i]) * row_bytes], row_bytes),
                0);
    }
    EXPECT_EQ(out.back(), 250);

    const std::int64_t places[] = {3, 0, 4};
    std::vector<std::uint8_t> spread(5 * row_bytes, 250);
    scatter_rows(spread.data(), places, in.data(), 3, row_bytes);
    for (std::size_t i = 0; i < 3; ++i) {
      EXPECT_EQ(std::memcmp(&spread[static_cast<std::size_t>(places[i]) * row_bytes],
                            &in[i * row_bytes], row_bytes),
                0);
    }
    for (std::size_t j = row_bytes; j < 3 * row_bytes; ++j) EXPECT_EQ(spread[j], 250);

    std::vector<std::uint8_t> copy(5 * row_bytes);
    gather_rows(copy.data(), in.data(), nullptr, 5, row_bytes);
    EXPECT_EQ(copy, in);
    std::fill(copy.begin(), copy.end(), 0);
    scatter_rows(copy.data(), nullptr, in.data(), 5, row_bytes);
    EXPECT_EQ(copy, in);
  }
  gather_rows(nullptr, nullptr, nullptr, 0, 8);
  scatter_rows(nullptr, nullptr, nullptr, 0, 8);
  convert(static_cast<float*>(nullptr), static_cast<const float*>(nullptr), 0);
}

// Every upper half with lower halves around the ties, zeros, denormals, NaN and Inf included.
TEST(Rows, Permute) {
  for (const std::int64_t count : {0, 1, 3, 4, 5, 16, 103}) {
    const auto n = static_cast<std::size_t>(count);
    std::vector<std::int32_t> index(n);
    std::iota(index.begin(), index.end(), 0);
    std::shuffle(index.begin(), index.end(), std::mt19937(1));
    std::vector<float> in(n), out(n + 1, -1.0F);
    std::vector<Bfloat16> narrow(n), narrow_out(n + 1, Bfloat16{77});
    for (std::size_t j = 0; j < n; ++j) {
      in[j] = static_cast<float>(j) + 0.5F;
      narrow[j] = Bfloat16{static_cast<std::uint16_t>(j + 1000)};
    }
    permute(out.data(), in.data(), index.data(), count);
    permute(narrow_out.data(), narrow.data(), index.data(), count);
    for (std::size_t j = 0; j < n; ++j) {
      EXPECT_EQ(out[j], in[static_cast<std::size_t>(index[j])]);
      EXPECT_EQ(narrow_out[j].bits, narrow[static_cast<std::size_t>(index[j])].bits);
    }
    EXPECT_EQ(out[n], -1.0F);
    EXPECT_EQ(narrow_out[n].bits, 77);
  }
}

TEST(Bfloat16, RoundsAsTorchDoes) {
  std::vector<float> values;
  for (std::uint32_t upper = 0; upper < 65536; ++upper) {
    for (const std::uint32_t lower : {0x0000U, 0x0001U, 0x7FFFU, 0x8000U, 0x8001U, 0xFFFFU}) {
      values.push_back(float_from_bits(upper << 16 | lower));
    }
  }
  const auto count = static_cast<std::int64_t>(values.size());
  std::vector<Bfloat16> got(values.size());
  convert(got.data(), values.data(), count);
  const at::Tensor want = at::tensor(at::ArrayRef<float>(values)).to(at::kBFloat16);
  const auto* expected = want.const_data_ptr<at::BFloat16>();
  std::int64_t wrong = 0, nan = 0;
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (std::isnan(values[i])) {
      ++nan;
      wrong += !std::isnan(to_float(got[i]));  // which NaN is free
    } else {
      wrong += got[i].bits != expected[i].x;
    }
  }
  EXPECT_EQ(wrong, 0);
  EXPECT_EQ(nan, 2 * (128 * 6 - 1));

  // Ties to even, by hand: 1 + 2^-8 down to 1, 1 + 3 * 2^-8 up to 1 + 2^-6.
  EXPECT_EQ(to_float(to_bfloat16(1.00390625F)), 1.0F);
  EXPECT_EQ(to_float(to_bfloat16(1.01171875F)), 1.015625F);
  EXPECT_TRUE(std::isinf(to_float(to_bfloat16(3.4e38F))));

  // Back to fp32: exact.
  std::vector<Bfloat16> all(65536);
  for (std::size_t i = 0; i < all.size(); ++i) all[i].bits = static_cast<std::uint16_t>(i);
  std::vector<float> wide(all.size());
  convert(wide.data(), all.data(), 65536);
  for (std::size_t i = 0; i < all.size(); ++i) {
    EXPECT_EQ(float_bits(wide[i]), static_cast<std::uint32_t>(i) << 16);
  }
}

TEST(Checksum, ValuesAreFixed) {
  // On the wire: parcels of every build carry these.
  std::string text;
  for (int i = 0; i < 100; ++i) text += static_cast<char>('a' + i % 26);
  EXPECT_EQ(checksum("", 0), 1855057241U);
  EXPECT_EQ(checksum(nullptr, 0, 1), 957276012U);
  EXPECT_EQ(checksum("a", 1), 968406967U);
  EXPECT_EQ(checksum("abcdefgh", 8), 711053447U);
  EXPECT_EQ(checksum(text.data(), 31), 1018223285U);
  EXPECT_EQ(checksum(text.data(), 32), 1012907656U);
  EXPECT_EQ(checksum(text.data(), 100), 4034199664U);
  EXPECT_EQ(checksum(text.data(), 100, 7), 492658377U);
}

TEST(Checksum, FindsDamage) {
  std::mt19937 random(1);
  for (const std::size_t size : {1, 5, 8, 31, 32, 40, 64, 200, 1000}) {
    std::vector<std::uint8_t> data(size);
    for (auto& byte : data) byte = static_cast<std::uint8_t>(random());
    const std::uint32_t right = checksum(data.data(), size);
    std::int64_t missed = 0;
    for (std::size_t bit = 0; bit < 8 * size; ++bit) {
      data[bit / 8] ^= static_cast<std::uint8_t>(1 << bit % 8);
      missed += checksum(data.data(), size) == right;
      data[bit / 8] ^= static_cast<std::uint8_t>(1 << bit % 8);
    }
    EXPECT_EQ(missed, 0) << size;
    // Cut, extended by zeros, and words swapped.
    EXPECT_NE(checksum(data.data(), size - 1), right);
    data.push_back(0);
    EXPECT_NE(checksum(data.data(), size + 1), right);
    data.pop_back();
    if (size >= 64) {
      std::swap_ranges(data.begin(), data.begin() + 8, data.begin() + 8);
      EXPECT_NE(checksum(data.data(), size), right);
      std::swap_ranges(data.begin(), data.begin() + 8, data.begin() + 8);
      std::swap_ranges(data.begin(), data.begin() + 32, data.begin() + 32);
      EXPECT_NE(checksum(data.data(), size), right);
    }
  }
  // Zeros of every length, and seeds, all differ.
  std::set<std::uint32_t> seen;
  const std::vector<std::uint8_t> zeros(300, 0);
  for (std::size_t size = 0; size <= 300; ++size) seen.insert(checksum(zeros.data(), size));
  for (std::uint64_t seed = 1; seed <= 300; ++seed) seen.insert(checksum(zeros.data(), 64, seed));
  EXPECT_EQ(seen.size(), 601U);
}

TEST(Checksum, DoesNotDependOnAlignment) {
  std::vector<std::uint8_t> data(200);
  for (std::size_t i = 0; i < 100; ++i) data[i] = static_cast<std::uint8_t>(i * i);
  const std::uint32_t right = checksum(data.data(), 100);
  for (std::size_t shift = 1; shift < 9; ++shift) {
    std::vector<std::uint8_t> moved(200);
    std::memcpy(moved.data() + shift, data.data(), 100);
    EXPECT_EQ(checksum(moved.data() + shift, 100), right);
  }
}

}  // namespace
}  // namespace lshmoe::kernels
