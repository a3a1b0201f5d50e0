// kinds fp8, int8 and int4: torch's own rounding, the formulas in double, stochastic rounding
// without bias, and rows of every size and range.

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <random>

#include "lshmoe/compress/codec.hpp"
#include "lshmoe/kernels/formats.hpp"
#include "lshmoe/runtime/error.hpp"
#include "tests/compress/rows.hpp"

namespace lshmoe {
namespace {
using testing::bytes_of;
using testing::field;
using testing::gaussian;
using testing::make_rows;

const std::vector<int64_t> kHidden{1, 7, 16, 64, 100, 384, 1000, 4096};
constexpr const char* kKinds[] = {"fp8", "int8", "int4"};

int64_t row_bytes(const std::string& kind, int64_t hidden) {
  const int64_t blocks = (hidden + 127) / 128;
  if (kind == "fp8") return 4 * blocks + hidden;
  return kind == "int8" ? 4 + hidden : 2 * blocks + (hidden + 1) / 2;
}

// e4m3 -------------------------------------------------------------------------------------------

TEST(E4m3, ValuesAreTorchs) {
  const at::Tensor codes = at::arange(256).to(at::kByte);
  const at::Tensor want = codes.view(at::kFloat8_e4m3fn).to(at::kFloat);
  for (int code = 0; code < 256; ++code) {
    if ((code & 0x7F) == 0x7F) continue;
    const float value = kernels::e4m3_value(static_cast<uint32_t>(code));
    EXPECT_EQ(std::bit_cast<uint32_t>(value), std::bit_cast<uint32_t>(want[code].item<float>()))
        << code;
  }
}

TEST(E4m3, RoundsAsTorchDoes) {
  // Every code's value, what lies half way to the next one, their neighbors, and anything.
  std::vector<float> values{0.0F, -0.0F, 1e-30F, 1e-40F, 448, 464, 480, 1e30F};
  for (uint32_t code = 0; code < 126; ++code) {
    const float low = kernels::e4m3_value(code), high = kernels::e4m3_value(code + 1);
    for (const float value : {low, (low + high) / 2}) {
      values.push_back(value);
      values.push_back(std::nextafter(value, 1000.0F));
      values.push_back(std::nextafter(value, 0.0F));
    }
  }
  std::mt19937 random(1);
  std::uniform_real_distribution<float> exponent(-12, 9);
  for (int i = 0; i < 100000; ++i) values.push_back(std::exp2(exponent(random)));
  const auto positive = values.size();
  for (std::size_t i = 0; i < positive; ++i) values.push_back(-values[i]);
  // torch gives NaN beyond 464; this one saturates, as the standard's other mode does.
  const at::Tensor want =
      at::tensor(values).clamp(-448, 448).to(at::kFloat8_e4m3fn).view(at::kByte);
  const auto* code = want.const_data_ptr<uint8_t>();
  for (std::size_t i = 0; i < values.size(); ++i) {
    ASSERT_EQ(kernels::to_e4m3<false>(values[i], 0), code[i]) << values[i];
  }
}

// Rows against the formulas -----------------------------------------------------------------------

struct Coded {
  at::Tensor rows;
  std::vector<uint8_t> parcel;
  CodecStats stats;
};
Coded code(const at::Tensor& x, const CodecOptions& options, int64_t layer = 0,
           Direction direction = Direction::dispatch) {
  const CodecContext context{x.size(1), layer, direction, x.scalar_type()};
  const Encoded encoded = make_codec(options, context)->encode(x, {x.size(0)});
  // Decoded by a codec that knows nothing but the options.
  const at::Tensor rows =
      make_codec(options, context)->decode(encoded.bytes, encoded.bytes_per_group).rows;
  return {rows, bytes_of(encoded.bytes), encoded.stats};
}
Coded code(const at::Tensor& x, const char* kind) { return code(x, CodecOptions().kind(kind)); }

TEST(Fp8, RowsAreTorchsWithBlockScales) {
  for (const int64_t hidden : kHidden) {
    for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
      const at::Tensor x = make_rows("outliers", 9, hidden, 3).to(dtype);
      std::vector<at::Tensor> blocks;
      for (int64_t first = 0; first < hidden; first += 128) {
        const at::Tensor block = x.to(at::kFloat).slice(1, first, std::min(first + 128, hidden));
        const at::Tensor scale = block.abs().amax(1, true) / 448.0;
        const at::Tensor quotient = (block / scale).clamp(-448, 448);
        blocks.push_back(quotient.to(at::kFloat8_e4m3fn).to(at::kFloat) * scale);
      }
      EXPECT_EQ(bytes_of(code(x, "fp8").rows), bytes_of(at::cat(blocks, 1).to(dtype))) << hidden;
    }
  }
}

TEST(Int8, RowsAreTheFormula) {
  for (const int64_t hidden : kHidden) {
    const at::Tensor x = make_rows("gaussian", 9, hidden, 4);
    const Coded coded = code(x, "int8");
    for (int64_t i = 0; i < 9; ++i) {
      const uint8_t* row = coded.parcel.data() + 40 + i * (4 + hidden);
      const double scale = x[i].abs().max().item<double>() / 127;
      EXPECT_NEAR(field<float>(row, 0) * 65536.0, scale, 1e-6 * scale);
      for (int64_t j = 0; j < hidden; ++j) {
        const double quotient = x[i][j].item<double>() / scale;
        const auto got = static_cast<int8_t>(row[4 + j]);
        EXPECT_LE(std::abs(got - quotient), 0.5 + 1e-4);
        EXPECT_NEAR(coded.rows[i][j].item<double>(), got * scale, 1e-5 * scale * 127);
        if (hidden > 500 && j > 200) break;
      }
    }
  }
}

// H x / sqrt(n) of each part of a row: blocks of 128, and the last one in powers of two.
std::vector<double> rotated(const std::vector<double>& x) {
  std::vector<double> out;
  for (std::size_t first = 0; first < x.size();) {
    std::size_t n = 128;
    while (n > x.size() - first) n /= 2;
    for (std::size_t i = 0; i < n; ++i) {
      double sum = 0;
      for (std::size_t j = 0; j < n; ++j) {
        sum += std::popcount(i & j) % 2 == 0 ? x[first + j] : -x[first + j];
      }
      out.push_back(sum / std::sqrt(static_cast<double>(n)));
    }
    first += n;
  }
  return out;
}

TEST(Int4, RowsAreTheFormulaAndTheirScalesTheBest) {
  for (const int64_t hidden : kHidden) {
    const at::Tensor x = make_rows(hidden == 384 ? "outliers" : "gaussian", 5, hidden, 5);
    const Coded coded = code(x, "int4");
    const int64_t blocks = (hidden + 127) / 128;
    for (int64_t i = 0; i < 5; ++i) {
      const uint8_t* row = coded.parcel.data() + 40 + i * row_bytes("int4", hidden);
      const uint8_t* codes = row + 2 * blocks;
      std::vector<double> exact, q, decoded;
      for (int64_t j = 0; j < hidden; ++j) exact.push_back(x[i][j].item<double>());
      const std::vector<double> z = rotated(exact);
      for (int64_t b = 0; b < blocks; ++b) {
        const auto bits = static_cast<uint32_t>(field<uint16_t>(row, 2 * static_cast<size_t>(b)));
        // The last bit turns the codes' sign.
        const double scale =
            (bits % 2 == 0 ? 65536.0 : -65536.0) * std::bit_cast<float>((bits & 0xFFFE) << 16);
        const auto first = static_cast<std::size_t>(128 * b);
        const std::size_t end = std::min(first + 128, z.size());
        double largest = 0, error = 0;
        for (std::size_t j = first; j < end; ++j) {
          const int nibble = codes[j / 2] >> (4 * (j % 2)) & 15,
                    got = nibble < 8 ? nibble : nibble - 16;
          const double quotient = std::clamp(z[j] / scale, -8.0, 7.0);
          EXPECT_LE(std::abs(got - quotient), 0.5 + 1e-4) << hidden << " " << j;
          decoded.push_back(got * scale);
          largest = std::max(largest, std::abs(z[j]));
          error += (got * scale - z[j]) * (got * scale - z[j]);
        }
        // No scale of a fine grid does notably better.
        for (double size = largest / 7; size > largest / 14; size *= 0.995) {
          double other = std::numeric_limits<double>::max();
          for (const double s : {size, -size}) {
            double sum = 0;
            for (std::size_t j = first; j < end; ++j) {
              const double d = std::clamp(std::nearbyint(z[j] / s), -8.0, 7.0) * s - z[j];
              sum += d * d;
            }
            other = std::min(other, sum);
          }
          // Few values can be met by chance.
          if (end - first == 128) {
            EXPECT_LE(error, 1.1 * other);
          }
        }
      }
      const std::vector<double> want = rotated(decoded);
      const double size = x[i].norm().item<double>();
      for (int64_t j = 0; j < hidden; ++j) {
        EXPECT_NEAR(coded.rows[i][j].item<double>(), want[static_cast<std::size_t>(j)],
                    1e-5 * size);
      }
    }
  }
  // The best uniform quantizer of 16 levels leaves 0.107 of a Gaussian value (Max, 1960); a scale
  // fitted to each block does a little better.
  EXPECT_LT(code(gaussian(200, 384, 6), "int4").stats.mean_relative_error, 0.107);
}

TEST(Int4, StochasticScalesCutNothingOff) {
  const at::Tensor x = gaussian(300, 128, 9);
  const Coded coded = code(x, CodecOptions().kind("int4").rounding("stochastic"));
  for (int64_t i = 0; i < 300; ++i) {
    const auto bits =
        static_cast<uint32_t>(field<uint16_t>(coded.parcel.data() + 40 + i * 66, 0) & 0xFFFE);
    const double scale = 65536.0 * std::bit_cast<float>(bits << 16);
    std::vector<double> row;
    for (int64_t j = 0; j < 128; ++j) row.push_back(x[i][j].item<double>());
    double largest = 0;
    for (const double z : rotated(row)) largest = std::max(largest, std::abs(z));
    EXPECT_GE(7 * scale, largest * (1 - 1e-6));
    EXPECT_LE(7 * scale, largest * 1.03);
  }
}

TEST(Int4, HadamardOfEverySize) {
  for (std::size_t n = 1; n <= 128; n *= 2) {
    std::mt19937 random(2);
    std::vector<float> x(n), scratch(n);
    for (float& value : x) value = static_cast<float>(static_cast<int>(random() % 200) - 100);
    const std::vector<double> before(x.begin(), x.end());
    kernels::hadamard(x.data(), scratch.data(), static_cast<int64_t>(n));
    for (std::size_t i = 0; i < n; ++i) {
      double want = 0;
      for (std::size_t j = 0; j < n; ++j) {
        want += std::popcount(i & j) % 2 == 0 ? before[j] : -before[j];
      }
      EXPECT_EQ(x[i], want) << n;
    }
  }
}

// Every row --------------------------------------------------------------------------------------

class Rows : public ::testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(Kinds, Rows, ::testing::ValuesIn(kKinds),
                         [](const auto& info) { return std::string(info.param); });

TEST_P(Rows, OfEverySizeAndRangeStayWithinTheFormat) {
  const std::string kind = GetParam();
  for (const int64_t hidden : kHidden) {
    for (const std::string& rows : testing::row_kinds()) {
      for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
        for (const char* rounding : {"nearest", "stochastic"}) {
          SCOPED_TRACE(rows + " " + std::to_string(hidden) + " " + rounding);
          const at::Tensor x = make_rows(rows, 7, hidden, 11).to(dtype);
          const Coded coded = code(x, CodecOptions().kind(kind).rounding(rounding));
          EXPECT_EQ(coded.stats.sent_bytes, 40 + 7 * row_bytes(kind, hidden));
          EXPECT_EQ(static_cast<int64_t>(coded.parcel.size()), coded.stats.sent_bytes);
          EXPECT_EQ(coded.stats.raw_bytes, 2 * 7 * hidden);
          EXPECT_EQ(coded.stats.max_error_ratio, 0);
          const at::Tensor exact = x.to(at::kDouble), got = coded.rows.to(at::kDouble);
          ASSERT_TRUE(got.isfinite().all().item<bool>());
          const at::Tensor error = (got - exact).abs();
          const at::Tensor norm = exact.norm(2, 1), lost = error.norm(2, 1);
          EXPECT_TRUE(lost.masked_select(norm == 0).eq(0).all().item<bool>());
          const at::Tensor relative = at::where(norm > 0, lost / norm, at::zeros_like(norm));
          const double largest = relative.max().item<double>();
          EXPECT_NEAR(coded.stats.max_relative_error, largest, 1e-9);
          EXPECT_NEAR(coded.stats.mean_relative_error, relative.mean().item<double>(), 1e-9);

          // What the format promises, twice that when rounding by chance, and the cast.
          const double times = std::string(rounding) == "nearest" ? 1.0001 : 2.0001;
          const at::Tensor cast =
              0x1p-149 + (exact.abs() + error) * (dtype == at::kFloat ? 0x1p-23 : 0x1p-8);
          for (int64_t first = 0; first < hidden; first += 128) {
            const int64_t end = kind == "int8" ? hidden : std::min(first + 128, hidden);
            const at::Tensor block = exact.slice(1, first, end);
            const at::Tensor most = block.abs().amax(1, true);
            const at::Tensor cut = error.slice(1, first, end);
            const at::Tensor slack = cast.slice(1, first, end);
            if (kind == "fp8") {
              const at::Tensor step = at::maximum(block.abs() / 16, most / 448 / 1024);
              EXPECT_TRUE((cut <= times * step + slack).all().item<bool>());
            } else if (kind == "int8") {
              EXPECT_TRUE((cut <= times * most / 254 + slack).all().item<bool>());
              break;
            } else {
              // A coefficient is at most the block's norm; a bfloat16 scale may be 2^-8 off.
              const at::Tensor size = block.norm(2, 1);
              const double n = static_cast<double>(end - first);
              const at::Tensor bound =
                  times * 1.02 * std::sqrt(n) / 14 * size + slack.norm(2, 1) + 1e-6 * size;
              EXPECT_TRUE((cut.norm(2, 1) <= bound).all().item<bool>());
            }
          }
        }
      }
    }
  }
}

TEST_P(Rows, LargestFloatsStayFinite) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    const double largest = dtype == at::kFloat ? std::numeric_limits<float>::max() : 0x1.FEp+127;
    for (const int64_t hidden : {1, 100, 300}) {
      const at::Tensor x = at::full({2, hidden}, largest, at::kDouble) *
                           at::tensor({1.0, -1.0}, at::kDouble).unsqueeze(1);
      const Coded coded = code(x.to(dtype), CodecOptions().kind(GetParam()));
      EXPECT_TRUE(coded.rows.isfinite().all().item<bool>());
      EXPECT_LT(coded.stats.max_relative_error, 0.08);
    }
  }
}

TEST_P(Rows, RefusesNanAndInf) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    for (const double bad : {std::nan(""), std::numeric_limits<double>::infinity()}) {
      at::Tensor x = gaussian(30, 10, 2).to(dtype);
      x.index_put_({17, 9}, bad);
      const auto codec =
          make_codec(CodecOptions().kind(GetParam()), {10, 4, Direction::dispatch_backward, dtype});
      try {
        static_cast<void>(codec->encode(x, at::tensor({3, 17}, at::kLong), {1, 1}));
        ADD_FAILURE() << "not refused";
      } catch (const InvalidArgument& error) {
        const std::string text = error.what();
        EXPECT_NE(text.find("row 17 holds NaN or Inf (dispatch_backward of layer 4"),
                  std::string::npos)
            << text;
      }
    }
  }
}

TEST_P(Rows, RefusesCodesAndScalesThatAreNeverWritten) {
  const std::string kind = GetParam();
  const CodecOptions options = CodecOptions().kind(kind);
  const int64_t hidden = 7;
  const std::vector<uint8_t> parcel = code(gaussian(2, hidden, 3), options).parcel;
  const auto size = static_cast<std::size_t>(row_bytes(kind, hidden));
  const auto refused = [&](std::size_t at, const std::vector<uint8_t>& bytes) {
    std::vector<uint8_t> damaged = parcel;
    std::copy(bytes.begin(), bytes.end(), damaged.begin() + 40 + static_cast<int64_t>(size + at));
    testing::reseal(damaged.data(), damaged.size());
    try {
      const auto length = static_cast<int64_t>(damaged.size());
      static_cast<void>(
          make_codec(options, {hidden})->decode(testing::to_tensor(damaged), {length}));
    } catch (const InvalidArgument& error) {
      return std::string(error.what()).find("decode: row 1 of kind " + kind) == 0;
    }
    return false;
  };
  EXPECT_FALSE(refused(size - 1, {1}));             // another value, no more
  const std::size_t high = kind == "int4" ? 0 : 2;  // the upper half of the scale
  EXPECT_TRUE(refused(high, {0xC0, 0x7F}));         // NaN
  EXPECT_TRUE(refused(high, {0x80, 0x7F}));         // Inf
  EXPECT_TRUE(refused(high, {0x80, 0x79}));         // 2^116: sums might leave fp32
  EXPECT_FALSE(refused(high, {0x80, 0x70}));        // 2^98
  std::vector<uint8_t> zero(high + 2, 0);
  EXPECT_FALSE(refused(0, zero));
  zero.back() = 0x80;
  EXPECT_TRUE(refused(0, zero));  // -0
  if (kind == "fp8") {
    EXPECT_TRUE(refused(size - 1, {0x7F}));
    EXPECT_TRUE(refused(size - 1, {0xFF}));
    EXPECT_FALSE(refused(size - 1, {0x7E}));
  } else if (kind == "int8") {
    EXPECT_TRUE(refused(size - 1, {0x80}));
    EXPECT_FALSE(refused(size - 1, {0x81}));
  } else {
    EXPECT_TRUE(refused(size - 1, {0x10}));  // in the padding
    EXPECT_TRUE(refused(0, {1, 0}));         // 0 with a sign to turn
  }
}

// Stochastic rounding -----------------------------------------------------------------------------

TEST_P(Rows, StochasticRoundingHasNoBias) {
  constexpr int kDraws = 4000;
  const at::Tensor x = gaussian(1, 200, 7);
  const at::Tensor exact = x.to(at::kDouble);
  at::Tensor sum = at::zeros_like(exact), squares = at::zeros_like(exact),
             neighbors = at::zeros({199}, at::kDouble);
  for (int seed = 0; seed < kDraws; ++seed) {
    const auto options = CodecOptions().kind(GetParam()).rounding("stochastic").seed(seed);
    const at::Tensor error = code(x, options).rows.to(at::kDouble) - exact;
    sum += error;
    squares += error * error;
    neighbors += error[0].slice(0, 0, 199) * error[0].slice(0, 1, 200);
  }
  const at::Tensor deviation = (squares / kDraws).sqrt();
  // 5 standard deviations of a mean, and what fp32 itself rounds.
  EXPECT_TRUE((sum.abs() / kDraws <= 5 * deviation / std::sqrt(kDraws) + 1e-6).all().item<bool>());
  // Nearest is far from that: the test would see a bias.
  const at::Tensor nearest = code(x, GetParam()).rows.to(at::kDouble) - exact;
  EXPECT_GT((nearest.abs() > 5 * deviation / std::sqrt(kDraws)).sum().item<int64_t>(), 100);
  // Elements have noise of their own.
  const at::Tensor expected = deviation[0].slice(0, 0, 199) * deviation[0].slice(0, 1, 200);
  const at::Tensor correlation = neighbors / kDraws / expected.clamp_min(1e-12);
  if (std::string(GetParam()) != "int4") {  // turned back, int4's errors are not independent
    EXPECT_LT(correlation.abs().max().item<double>(), 0.12);
  }
}

TEST_P(Rows, NoiseIsAFunctionOfSeedLayerDirectionAndRow) {
  const at::Tensor x = gaussian(3, 64, 8);
  const auto options = CodecOptions().kind(GetParam()).rounding("stochastic");
  const auto parcel = [&](const CodecOptions& o, int64_t layer, Direction direction) {
    return code(x, o, layer, direction).parcel;
  };
  const auto first = parcel(options, 1, Direction::dispatch);
  EXPECT_EQ(parcel(options, 1, Direction::dispatch), first);
  EXPECT_NE(parcel(CodecOptions(options).seed(1), 1, Direction::dispatch), first);
  EXPECT_NE(parcel(options, 2, Direction::dispatch), first);
  EXPECT_NE(parcel(options, 1, Direction::combine), first);
  // A row alone, or elsewhere, has the same bytes.
  const Coded alone = code(x.narrow(0, 2, 1), options, 1);
  const auto size = row_bytes(GetParam(), 64);
  EXPECT_TRUE(
      std::equal(alone.parcel.begin() + 40, alone.parcel.end(), first.begin() + 40 + 2 * size));
  // Rows that differ in one element far off have noise of their own.
  at::Tensor other = x.clone();
  other.select(1, 63).add_(1e-3);
  const auto changed = code(other, options, 1).parcel;
  int64_t differ = 0;
  for (std::size_t i = 40; i < first.size(); ++i) differ += first[i] != changed[i];
  EXPECT_GT(differ, 3 * size / 8);
}

TEST(Rounding, IsRefusedWhereItIsNotThere) {
  const auto text = [](const CodecOptions& options) {
    try {
      validate(options);
    } catch (const InvalidArgument& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  for (const char* kind : {"fp8", "int8", "int4"}) {
    EXPECT_EQ(text(CodecOptions().kind(kind).rounding("stochastic")), "");
    EXPECT_NE(text(CodecOptions().kind(kind).rounding("dithered")), "");
  }
  EXPECT_EQ(text(CodecOptions().kind("lsh").rounding("dithered")), "");
  EXPECT_NE(text(CodecOptions().kind("lsh").rounding("dithered").restore("source"))
                .find("rounding dithered is for restore expert"),
            std::string::npos);
  for (const std::string kind : {"none", "bf16", "lsh"}) {
    EXPECT_NE(text(CodecOptions().kind(kind).rounding("stochastic"))
                  .find("rounding stochastic is not for kind " + kind),
              std::string::npos);
  }
  EXPECT_NE(text(CodecOptions().kind("int8").rounding("up")).find("unknown rounding 'up'"),
            std::string::npos);
}

}  // namespace
}  // namespace lshmoe
