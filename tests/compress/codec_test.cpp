// What every codec promises, checked by decoding: the error bound of every row, exact kinds, the
// statistics, and equal bytes for equal input.

#include "lshmoe/compress/codec.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <numeric>

#include "lshmoe/runtime/error.hpp"
#include "tests/compress/rows.hpp"

namespace lshmoe {
namespace {
using testing::bytes_of;
using testing::clustered;
using testing::gaussian;
using testing::make_rows;

// Groups of every size, empty ones at the ends and between.
const std::vector<int64_t> kGroups{0, 1, 2, 0, 33, 257, 0};
constexpr int64_t kRows = 293;

// Decodes parcel by parcel, as receivers do: each with a codec of its own and nothing else.
at::Tensor receive(const Encoded& encoded, const CodecOptions& options,
                   const CodecContext& context) {
  std::vector<at::Tensor> rows{at::empty({0, context.hidden_size}, context.dtype)};
  int64_t from = 0;
  const auto codec = make_codec(options, context);
  for (const int64_t size : encoded.bytes_per_group) {
    rows.push_back(codec->decode(encoded.bytes.narrow(0, from, size).clone(), {size}).rows);
    from += size;
  }
  return at::cat(rows);
}

// Errors and their bounds in double, and what the statistics should say.
struct Measured {
  std::vector<double> error, norm, bound;
  double max_relative = 0, mean_relative = 0, max_ratio = 0;
};
Measured measure(const at::Tensor& x, const at::Tensor& decoded, const std::vector<int64_t>& groups,
                 double max_error, bool by_group) {
  const at::Tensor exact = x.to(at::kDouble).contiguous();
  const at::Tensor got = decoded.to(at::kDouble).contiguous();
  const at::Tensor reference = testing::references(x, groups, by_group).contiguous();
  const auto* a = exact.const_data_ptr<double>();
  const auto* b = got.const_data_ptr<double>();
  const int64_t hidden = x.size(1);
  Measured m;
  for (int64_t i = 0; i < x.size(0); ++i) {
    double error = 0, norm = 0;
    for (int64_t j = i * hidden; j < (i + 1) * hidden; ++j) {
      error += (a[j] - b[j]) * (a[j] - b[j]);
      norm += a[j] * a[j];
    }
    m.error.push_back(std::sqrt(error));
    m.norm.push_back(std::sqrt(norm));
    m.bound.push_back(max_error * reference.const_data_ptr<double>()[i]);
  }
  for (std::size_t i = 0; i < m.error.size(); ++i) {
    const double relative = m.norm[i] > 0 ? m.error[i] / m.norm[i] : 0;
    m.max_relative = std::max(m.max_relative, relative);
    m.mean_relative += relative / static_cast<double>(m.error.size());
    if (m.bound[i] > 0) m.max_ratio = std::max(m.max_ratio, m.error[i] / m.bound[i]);
  }
  return m;
}

void expect_close(double got, double want) { EXPECT_NEAR(got, want, 1e-9 * want); }

// All that holds for kind lsh, restore=expert.
void check_lsh(const at::Tensor& x, const std::vector<int64_t>& groups, const CodecOptions& options,
               const CodecContext& context) {
  const auto codec = make_codec(options, context);
  const Encoded encoded = codec->encode(x, groups);
  const at::Tensor decoded = receive(encoded, options, context);
  ASSERT_EQ(decoded.sizes(), x.sizes());
  ASSERT_EQ(decoded.scalar_type(), x.scalar_type());

  const std::string reference = options.error_reference();
  const Measured m = measure(x, decoded, groups, options.max_error(), reference == "group");
  int64_t beyond = 0, not_zero = 0;
  for (std::size_t i = 0; i < m.error.size(); ++i) {
    beyond += !(m.error[i] <= m.bound[i]);
    not_zero += m.norm[i] == 0 && m.error[i] != 0;
  }
  EXPECT_EQ(beyond, 0) << "rows beyond their bound";
  EXPECT_EQ(not_zero, 0) << "zero rows that did not come back zero";
  if (options.max_error() == 0) {
    EXPECT_EQ(bytes_of(decoded), bytes_of(x));
  }

  const CodecStats& stats = encoded.stats;
  EXPECT_EQ(stats.rows, x.size(0));
  EXPECT_EQ(stats.raw_bytes, 2 * x.numel());
  EXPECT_EQ(stats.sent_bytes, encoded.bytes.numel());
  EXPECT_EQ(
      std::accumulate(encoded.bytes_per_group.begin(), encoded.bytes_per_group.end(), int64_t{0}),
      encoded.bytes.numel());
  expect_close(stats.max_relative_error, m.max_relative);
  expect_close(stats.mean_relative_error, m.mean_relative);
  expect_close(stats.max_error_ratio, m.max_ratio);
  EXPECT_LE(stats.max_error_ratio, 1);

  // What the parcels themselves say about whole rows and clusters.
  int64_t whole = 0, first = 0, centroids = 0;
  const auto* parcel = encoded.bytes.const_data_ptr<uint8_t>();
  ASSERT_EQ(encoded.bytes_per_group.size(), groups.size());
  ASSERT_EQ(encoded.centroids_per_group.size(), groups.size());
  ASSERT_EQ(encoded.assignment.size(0), x.size(0));
  const auto* assignment = encoded.assignment.const_data_ptr<int64_t>();
  int64_t wrong_ids = 0;
  for (std::size_t group = 0; group < groups.size(); ++group) {
    EXPECT_EQ(encoded.bytes_per_group[group] == 0, groups[group] == 0);
    if (groups[group] == 0) continue;
    const testing::Directory directory = testing::read_directory(parcel);
    ASSERT_EQ(static_cast<int64_t>(directory.id.size()), groups[group]);
    EXPECT_EQ(directory.centroids, encoded.centroids_per_group[group]);
    for (int64_t i = 0; i < groups[group]; ++i) {
      const int64_t id = directory.id[static_cast<std::size_t>(i)];
      whole += directory.whole[static_cast<std::size_t>(i)] ? 1 : 0;
      wrong_ids += assignment[first + i] != (id == 0 ? -1 : centroids + id - 1);
    }
    // Never above the rows as they are.
    EXPECT_LE(encoded.bytes_per_group[group],
              40 + groups[group] * x.size(1) * static_cast<int64_t>(x.element_size()));
    first += groups[group];
    centroids += directory.centroids;
    parcel += encoded.bytes_per_group[group];
  }
  EXPECT_EQ(wrong_ids, 0);
  EXPECT_EQ(stats.whole_rows, whole);
  EXPECT_EQ(stats.clusters, centroids);
  EXPECT_EQ(encoded.centroids.size(0), centroids);
}

class BoundTest : public ::testing::TestWithParam<std::tuple<std::string, at::ScalarType>> {};

TEST_P(BoundTest, HoldsForEveryRow) {
  const auto& [kind, dtype] = GetParam();
  for (const int64_t hidden : {1, 7, 16, 64, 100, 384, 1000}) {
    const at::Tensor x = make_rows(kind, kRows, hidden, 5).to(dtype);
    for (const char* reference : {"row", "group"}) {
      for (const double max_error : {0.0, 1e-4, 0.004, 0.05, 0.1, 0.5, 2.0}) {
        SCOPED_TRACE(::testing::Message() << kind << " " << dtype << " hidden " << hidden << " "
                                          << reference << " " << max_error);
        const auto options =
            CodecOptions().max_error(max_error).error_reference(reference).hashes(2).projection(
                hidden > 200 ? 16 : 64);
        check_lsh(x, kGroups, options, {hidden, 3, Direction::dispatch, dtype});
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Rows, BoundTest,
                         ::testing::Combine(::testing::ValuesIn(testing::row_kinds()),
                                            ::testing::Values(at::kFloat, at::kBFloat16)),
                         [](const auto& info) {
                           return std::get<0>(info.param) +
                                  (std::get<1>(info.param) == at::kFloat ? "_f32" : "_bf16");
                         });

TEST(Codec, RowsOfAllSizesInOneGroup) {
  // Values from the least denormal to the largest float, in one group and in one row.
  at::Tensor x = gaussian(64, 48, 1);
  at::Tensor exponent = at::arange(64 * 48, at::kDouble).mul(37).remainder(276).sub(149);
  at::Tensor wide = (x.sign() * at::pow(2.0, exponent.view({64, 48}))).to(at::kFloat);
  ASSERT_TRUE(at::isfinite(wide).all().item<bool>());
  for (const char* reference : {"row", "group"}) {
    for (const double max_error : {1e-7, 1e-3, 0.1, 1e10}) {
      SCOPED_TRACE(::testing::Message() << reference << " " << max_error);
      check_lsh(wide, {1, 20, 43}, CodecOptions().max_error(max_error).error_reference(reference),
                {48, 0, Direction::combine, at::kFloat});
    }
  }
  const float largest = std::numeric_limits<float>::max();
  const at::Tensor sign = at::tensor({1, 1, -1, -1, 1}, at::kFloat).unsqueeze(1);
  check_lsh(at::full({5, 48}, largest) * sign, {5}, CodecOptions().error_reference("row"),
            {48, 0, Direction::dispatch, at::kFloat});
}

TEST(Codec, NoRows) {
  for (const char* kind : {"none", "bf16", "fp8", "int8", "int4", "lsh"}) {
    for (const char* restore : {"expert", "source"}) {
      const auto codec = make_codec(CodecOptions().kind(kind).restore(restore), {12});
      for (const std::vector<int64_t>& groups : {std::vector<int64_t>{}, {0}, {0, 0, 0}}) {
        const Encoded encoded = codec->encode(at::empty({0, 12}), groups);
        EXPECT_EQ(encoded.bytes.numel(), 0);
        EXPECT_EQ(encoded.bytes_per_group, groups);
        EXPECT_EQ(encoded.stats.rows, 0);
        EXPECT_EQ(encoded.stats.max_relative_error, 0);
        const Decoded decoded = codec->decode(encoded.bytes, encoded.bytes_per_group);
        EXPECT_EQ(decoded.rows.sizes(), (at::IntArrayRef{0, 12}));
        EXPECT_EQ(decoded.rows_per_group, groups);
      }
    }
  }
}

// NaN and Inf of every kind and sign among the rows.
at::Tensor with_special_values(at::ScalarType dtype) {
  at::Tensor x = gaussian(kRows, 21, 9).to(dtype);
  const double inf = std::numeric_limits<double>::infinity();
  x.index_put_({5, 3}, std::nan(""));
  x.index_put_({6, 0}, -inf);
  x.index_put_({7, 20}, inf);
  x.index_put_({8, 1}, -0.0);
  return x;
}

TEST(Codec, KindNoneIsExact) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kDouble}) {
    const at::Tensor x = with_special_values(dtype);
    const CodecOptions options = CodecOptions().kind("none");
    const CodecContext context{21, 0, Direction::combine, dtype};
    const Encoded encoded = make_codec(options, context)->encode(x, kGroups);
    EXPECT_EQ(bytes_of(receive(encoded, options, context)), bytes_of(x));
    EXPECT_EQ(encoded.stats.whole_rows, kRows);
    EXPECT_EQ(encoded.stats.max_relative_error, 0);
    EXPECT_EQ(encoded.stats.raw_bytes, 2 * x.numel());
    EXPECT_EQ(encoded.stats.sent_bytes,
              4 * 40 + x.numel() * static_cast<int64_t>(x.element_size()));
  }
}

TEST(Codec, KindBf16RoundsAsTorchDoes) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    const at::Tensor x = with_special_values(dtype);
    const CodecOptions options = CodecOptions().kind("bf16");
    const CodecContext context{21, 0, Direction::dispatch, dtype};
    const Encoded encoded = make_codec(options, context)->encode(x, kGroups);
    const at::Tensor got = receive(encoded, options, context), want = x.to(at::kBFloat16).to(dtype);
    EXPECT_TRUE(at::equal(got.isnan(), want.isnan()));
    EXPECT_EQ(bytes_of(got.nan_to_num(7)), bytes_of(want.nan_to_num(7)));
    EXPECT_EQ(encoded.stats.sent_bytes, 4 * 40 + 2 * x.numel());
    const at::Tensor finite = x.slice(0, 36), rounded = want.slice(0, 36);
    const Encoded rest = make_codec(options, context)->encode(finite, {finite.size(0)});
    const Measured m = measure(finite, rounded, {finite.size(0)}, 0, false);
    expect_close(rest.stats.max_relative_error, m.max_relative);
    expect_close(rest.stats.mean_relative_error, m.mean_relative);
  }
}

std::string error_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const InvalidArgument& error) {
    return error.what();
  }
  return "no InvalidArgument";
}

TEST(Codec, LshRefusesNanAndInf) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    for (const double bad : {std::nan(""), std::numeric_limits<double>::infinity(),
                             -std::numeric_limits<double>::infinity()}) {
      for (const char* restore : {"expert", "source"}) {
        for (const double max_error : {0.0, 0.1}) {
          at::Tensor x = gaussian(30, 10, 2).to(dtype);
          x.index_put_({17, 9}, bad);
          const auto codec = make_codec(CodecOptions().restore(restore).max_error(max_error),
                                        {10, 4, Direction::dispatch_backward, dtype});
          const std::string direct = error_of([&] {
            static_cast<void>(codec->encode(x, {10, 20}));
          });
          EXPECT_NE(direct.find("row 17 holds NaN or Inf (dispatch_backward of layer 4"),
                    std::string::npos)
              << direct;
          // The index is that of the tensor given, not of the stream.
          const at::Tensor index = at::tensor({3, 17, 1}, at::kLong);
          const std::string indexed = error_of([&] {
            static_cast<void>(codec->encode(x, index, {1, 2}));
          });
          EXPECT_NE(indexed.find("row 17 holds"), std::string::npos) << indexed;
          EXPECT_NO_THROW(static_cast<void>(codec->encode(x, index.narrow(0, 0, 1), {1})));
        }
      }
    }
  }
}

// Every setting that changes what is computed.
std::vector<CodecOptions> settings() {
  std::vector<CodecOptions> all{CodecOptions().kind("none"), CodecOptions().kind("bf16"),
                                CodecOptions().restore("source").refine(0),
                                CodecOptions().restore("source").refine(2),
                                CodecOptions().max_error(0)};
  for (const char* kind : {"fp8", "int8", "int4"}) {
    for (const char* rounding : {"nearest", "stochastic"}) {
      all.push_back(CodecOptions().kind(kind).rounding(rounding));
    }
  }
  for (const char* reference : {"row", "group"}) {
    all.push_back(CodecOptions().error_reference(reference).rounding("dithered"));
    for (const int64_t refine : {0, 1}) {
      all.push_back(CodecOptions().error_reference(reference).refine(refine));
    }
  }
  return all;
}

TEST(Codec, EqualInputGivesEqualBytes) {
  const int threads_before = at::get_num_threads();
  const at::Tensor x = clustered(500, 70, 6, 0.2, 3);
  const std::vector<int64_t> groups{200, 0, 300};
  for (const CodecOptions& options : settings()) {
    at::set_num_threads(1);
    const Encoded first = make_codec(options, {70, 1})->encode(x, groups);
    for (const int threads : {1, 2, 3, 7}) {
      at::set_num_threads(threads);
      const auto codec = make_codec(options, {70, 1});
      for (int repeat = 0; repeat < 2; ++repeat) {
        const Encoded again = codec->encode(x.clone(), groups);
        EXPECT_EQ(bytes_of(again.bytes), bytes_of(first.bytes)) << options.kind();
        EXPECT_EQ(again.bytes_per_group, first.bytes_per_group);
      }
    }
  }
  at::set_num_threads(threads_before);
}

TEST(Codec, RowIndexIsTheSameAsGatheredRows) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    const at::Tensor x = clustered(120, 40, 4, 0.2, 8).to(dtype);
    const at::Tensor index = at::cat({at::arange(119, -1, -2), at::arange(0, 120, 3)});
    const std::vector<int64_t> groups{0, 25, 35, 40};
    // Rows of a wider tensor: not contiguous.
    const at::Tensor strided = at::cat({x, x}, 1).narrow(1, 0, 40);
    for (const CodecOptions& options : settings()) {
      const CodecContext context{40, 2, Direction::combine, dtype};
      const auto codec = make_codec(options, context);
      const Encoded picked = codec->encode(x, index, groups);
      const Encoded gathered = codec->encode(x.index_select(0, index), groups);
      EXPECT_EQ(bytes_of(picked.bytes), bytes_of(gathered.bytes));
      EXPECT_EQ(picked.bytes_per_group, gathered.bytes_per_group);
      EXPECT_EQ(bytes_of(codec->encode(strided, index, groups).bytes), bytes_of(picked.bytes));

      // Decoded anywhere into a larger tensor; the rows not named stay.
      const Decoded decoded = codec->decode(picked.bytes, picked.bytes_per_group);
      const int64_t rows = decoded.rows.size(0);
      at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(1);
      const at::Tensor places = at::randperm(rows + 9, generator, at::kLong);
      at::Tensor out = at::full({rows + 9, 40}, 55, dtype);
      codec->decode_into(out, places.narrow(0, 0, rows), picked.bytes, picked.bytes_per_group,
                         decoded.rows_per_group);
      EXPECT_EQ(bytes_of(out.index_select(0, places.narrow(0, 0, rows))), bytes_of(decoded.rows));
      EXPECT_TRUE(out.index_select(0, places.narrow(0, rows, 9)).eq(55).all().item<bool>());
    }
  }
}

TEST(Codec, DirectionChoosesReferenceAndRounding) {
  const at::Tensor x = make_rows("gaussian", 64, 32, 4) * at::arange(1, 65).unsqueeze(1);
  const auto bytes = [&](Direction direction, const char* reference, const char* rounding) {
    const auto options = CodecOptions().error_reference(reference).rounding(rounding);
    return bytes_of(make_codec(options, {32, 0, direction})->encode(x, {64}).bytes);
  };
  const Direction forward = Direction::dispatch;
  ASSERT_NE(bytes(forward, "row", "nearest"), bytes(forward, "group", "nearest"));
  ASSERT_NE(bytes(forward, "row", "nearest"), bytes(forward, "row", "dithered"));
  EXPECT_EQ(bytes(forward, "", ""), bytes(forward, "row", "nearest"));
  EXPECT_EQ(bytes(Direction::combine, "", ""), bytes(Direction::combine, "group", "nearest"));
  for (const Direction direction : {Direction::dispatch_backward, Direction::combine_backward}) {
    EXPECT_EQ(bytes(direction, "", ""), bytes(direction, "group", "dithered"))
        << name_of(direction);
  }
}

// Error texts ------------------------------------------------------------------------------------

// The text must hold `part`, and be one line.
void expect_error(const std::function<void()>& call, const std::string& part) {
  const std::string text = error_of(call);
  EXPECT_NE(text.find(part), std::string::npos) << text;
  EXPECT_EQ(text.find('\n'), std::string::npos) << text;
}

TEST(CodecErrors, Options) {
  const double nan = std::nan(""), inf = std::numeric_limits<double>::infinity();
  const std::vector<std::pair<CodecOptions, std::string>> cases{
      {CodecOptions().kind("zip"),
       "unknown codec kind 'zip': use none, bf16, fp8, int8, int4 or lsh"},
      {CodecOptions().kind(""), "unknown codec kind ''"},
      {CodecOptions().restore("here"), "unknown restore 'here': use expert or source"},
      {CodecOptions().max_error(-0.1), "max_error -0.1 (it bounds a row's relative error) must be"},
      {CodecOptions().max_error(nan), "must be a finite number >= 0"},
      {CodecOptions().max_error(inf), "must be a finite number >= 0"},
      {CodecOptions().error_reference("mean"), "unknown error_reference 'mean': use row or group"},
      {CodecOptions().hashes(0), "hashes 0 must be 1 to 16"},
      {CodecOptions().hashes(17), "hashes 17 must be 1 to 16"},
      {CodecOptions().hash_dim(0), "hash_dim 0 must be 1 to 1024"},
      {CodecOptions().hash_dim(1025), "hash_dim 1025 must be 1 to 1024"},
      {CodecOptions().hashes(16).hash_dim(9).projection(144), "do not fit one 64-bit bucket key"},
      {CodecOptions().projection(23), "projection 23 must be hashes * hash_dim = 24 at least"},
      {CodecOptions().projection(65537), "projection 65537 must be"},
      {CodecOptions().refine(-1), "refine -1 must be 0 to 100"},
      {CodecOptions().max_clusters(-1), "max_clusters -1 must be 0 (no clusters) to 65535"},
      {CodecOptions().max_clusters(65536), "max_clusters 65536 must be"},
      {CodecOptions().alpha(nan), "alpha nan must be finite"},
      {CodecOptions().estimate_alpha(true), "estimate_alpha needs restore source"},
      {CodecOptions().restore("source").alpha_probes(0), "alpha_probes 0 must be 1 or more"},
  };
  for (const auto& [options, text] : cases) {
    expect_error([&o = options] { validate(o); }, text);
    expect_error([&o = options] { static_cast<void>(make_codec(o, {8})); }, text);
  }
  // The limits themselves are fine.
  EXPECT_NO_THROW(validate(CodecOptions().hashes(16).hash_dim(8).projection(128)));
  EXPECT_NO_THROW(validate(CodecOptions().max_error(0).max_clusters(65535).refine(100)));
}

TEST(CodecErrors, Context) {
  const auto make = [](const char* kind, int64_t hidden, at::ScalarType dtype) {
    return [=] {
      static_cast<void>(
          make_codec(CodecOptions().kind(kind), {hidden, 0, Direction::dispatch, dtype}));
    };
  };
  for (const char* kind : {"none", "bf16", "lsh"}) {
    expect_error(make(kind, 0, at::kFloat), "hidden_size 0 must be 1 to 2^24");
    expect_error(make(kind, -3, at::kFloat), "hidden_size -3 must be");
    expect_error(make(kind, (1 << 24) + 1, at::kFloat), "hidden_size 16777217 must be");
    expect_error(make(kind, 8, at::kHalf), "does not take rows of dtype Half: use float32 or");
    expect_error(make(kind, 8, at::kLong), "does not take rows of dtype Long");
  }
  // A basis of large rows, unless it is forced.
  const auto basis = [](int64_t hidden, bool force) {
    return [=] {
      const auto options = CodecOptions().state("learned").transform("basis").force_basis(force);
      static_cast<void>(make_codec(options, {hidden, 0, Direction::dispatch, at::kFloat}));
    };
  };
  expect_error(basis(2049, false), "transform basis at hidden_size 2049");
  EXPECT_NO_THROW(basis(2049, true)());
  EXPECT_NO_THROW(basis(2048, false)());
  expect_error(make("lsh", 8, at::kDouble), "codec kind lsh does not take rows of dtype Double");
  expect_error(make("bf16", 8, at::kDouble), "codec kind bf16 does not take rows of dtype Double");
}

TEST(CodecErrors, Encode) {
  const auto codec = make_codec(CodecOptions(), {8});
  const at::Tensor x = gaussian(5, 8, 1);
  const auto encode = [&](const at::Tensor& rows, const at::Tensor& index,
                          const std::vector<int64_t>& groups) {
    return [=, &codec] { static_cast<void>(codec->encode(rows, index, groups)); };
  };
  const at::Tensor all;
  expect_error(encode(at::Tensor(), all, {0}), "the rows must be a tensor on the CPU");
  expect_error(encode(x.narrow(1, 0, 7), all, {5}), "rows of shape [5, 7], expected [tokens, 8]");
  expect_error(encode(x.unsqueeze(0), all, {1}), "rows of shape [1, 5, 8], expected [tokens, 8]");
  expect_error(encode(x.to(at::kDouble), all, {5}),
               "rows of dtype Double, this codec was made for Float");
  expect_error(encode(x, all, {2, 2}), "rows_per_group sums to 4, but there are 5 rows");
  expect_error(encode(x, all, {6, -1}), "a group of -1 rows");
  expect_error(encode(x, all, {}), "rows_per_group sums to 0, but there are 5 rows");
  expect_error(encode(x, at::tensor({0, 5}, at::kLong), {2}),
               "row_index[1] = 5 is not one of the 5 rows");
  expect_error(encode(x, at::tensor({-1}, at::kLong), {1}),
               "row_index[0] = -1 is not one of the 5 rows");
  expect_error(encode(x, at::tensor({0, 1}, at::kInt), {2}),
               "row_index must be a contiguous int64");
  expect_error(encode(x, at::zeros({1, 1}, at::kLong), {1}),
               "row_index must be a contiguous int64");
  expect_error(encode(x, at::tensor({0, 1}, at::kLong), {5}),
               "rows_per_group sums to 5, but there are 2 rows");
}

TEST(CodecErrors, Decode) {
  const auto codec = make_codec(CodecOptions(), {8});
  const Encoded encoded = codec->encode(gaussian(5, 8, 1), {5});
  const at::Tensor index = at::arange(5);
  const auto into = [&](at::Tensor out, const at::Tensor& to) {
    return [=, &codec, &encoded]() mutable {
      codec->decode_into(out, to, encoded.bytes, encoded.bytes_per_group, {5});
    };
  };
  const std::string wanted = "out must be contiguous [rows, 8] of dtype Float on the CPU";
  expect_error(into(at::Tensor(), index), wanted);
  expect_error(into(at::empty({5, 7}), index), wanted);
  expect_error(into(at::empty({5, 8}, at::kBFloat16), index), wanted);
  expect_error(into(at::empty({8, 5}).t(), index), wanted);
  expect_error(into(at::empty({5, 8}), at::Tensor()), "row_index is undefined");
  expect_error(into(at::empty({4, 8}), index), "row_index[4] = 4 is not one of the 4 rows");
  expect_error(into(at::empty({5, 8}), index.narrow(0, 0, 4)),
               "rows_per_group sums to 5, but there are 4 rows");
  EXPECT_NO_THROW(into(at::empty({5, 8}), index)());

  const int64_t size = encoded.bytes.numel();
  const std::string bytes = "the bytes must be a contiguous uint8 vector on the CPU";
  const auto decode = [&](const at::Tensor& given) {
    return [=, &codec] { static_cast<void>(codec->decode(given, {size})); };
  };
  expect_error(decode(at::Tensor()), bytes);
  expect_error(decode(encoded.bytes.to(at::kInt)), bytes);
  expect_error(decode(encoded.bytes.unsqueeze(0)), bytes);
  expect_error(decode(at::cat({encoded.bytes, encoded.bytes}).slice(0, 0, 2 * size, 2)), bytes);
}

// Dither of kind lsh: the same bound, over the seeds' dithers the row in the mean, and single rows
// no worse than to nearest.
TEST(Codec, DitherKeepsTheBoundAndTheMean) {
  const at::Tensor x = make_rows("outliers", 40, 64, 21);
  for (const double max_error : {0.05, 0.3}) {
    const auto options = CodecOptions().max_error(max_error).rounding("dithered");
    const CodecContext context{64};
    at::Tensor sum = at::zeros({40, 64}, at::kDouble);
    double single = 0;
    constexpr int kSeeds = 400;
    for (int seed = 0; seed < kSeeds; ++seed) {
      const auto codec =
          make_codec(CodecOptions(options).seed(static_cast<uint64_t>(seed)), context);
      const Encoded encoded = codec->encode(x, {40});
      const at::Tensor rows = codec->decode(encoded.bytes, {encoded.bytes.numel()}).rows;
      const Measured m = measure(x, rows, {40}, max_error, false);
      EXPECT_LE(m.max_ratio, 1.0);
      single += m.mean_relative / kSeeds;
      sum += rows.to(at::kDouble);
      EXPECT_EQ(bytes_of(codec->encode(x, {40}).bytes), bytes_of(encoded.bytes));
    }
    const Measured mean = measure(x, sum / kSeeds, {40}, max_error, false);
    EXPECT_GT(single, 0.5 * max_error);
    // To nearest it is 1. Chance alone leaves 1 / sqrt(400) = 0.05; taking the largest step that
    // keeps the bound favors steps at which the dither happened to be kind (measured: 0.11, 0.08).
    EXPECT_LT(mean.mean_relative, 0.15 * single) << max_error;
  }
}

// C2: with max_error 0 every mode gives the rows themselves, restore=source too.
TEST(Codec, RestoreAtTheSourceSendsRowsWholeAtBoundZero) {
  const auto options = CodecOptions().restore("source").max_error(0);
  EXPECT_FALSE(sends_centroids(options));
  EXPECT_TRUE(sends_centroids(CodecOptions().restore("source")));
  const auto codec = make_codec(options, CodecContext{24});
  const at::Tensor x = clustered(50, 24, 3, 0.1, 22);
  const Encoded encoded = codec->encode(x, {20, 30});
  EXPECT_TRUE(at::equal(codec->decode(encoded.bytes, encoded.bytes_per_group).rows, x));
}

}  // namespace
}  // namespace lshmoe
