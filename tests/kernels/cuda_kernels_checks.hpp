#pragma once
// Each CUDA kernel against the CPU's own loop: equal bits, where nothing else is said.
//
// The file that includes this says where the kernels run: before it, it declares in
// lshmoe::kernels
//   Vector<T>              a std::vector in memory that the kernels and the CPU see, after which
//                          every launch has ended when the launcher returns
//   const char* why_not()  why nothing can run, or nullptr
//   kRows[]                numbers of rows
// and brings the launchers of kernels/cuda into the namespace `cuda`.

#include <gtest/gtest.h>

#include <numeric>
#include <random>

#include "lshmoe/compress/row_coder.hpp"
#include "lshmoe/kernels/checksum.hpp"
#include "lshmoe/kernels/lsh.hpp"
#include "lshmoe/kernels/reference_norm.hpp"
#include "lshmoe/kernels/rows.hpp"

namespace lshmoe::kernels {
namespace {

constexpr std::int64_t kHidden[] = {16, 100, 384, 4096};

template <class T>
Vector<T> normal(std::int64_t count, unsigned seed, float scale = 1) {
  std::mt19937 random(seed);
  std::normal_distribution<float> draw(0, scale);
  Vector<T> values(static_cast<std::size_t>(count));
  for (T& value : values) value = from_float<T>(draw(random));
  return values;
}
Vector<std::int64_t> some_index(std::int64_t count, std::int64_t of, unsigned seed) {
  std::mt19937 random(seed);
  Vector<std::int64_t> index(static_cast<std::size_t>(count));
  for (auto& i : index) i = static_cast<std::int64_t>(random()) % of;
  return index;
}
template <class T>
bool same(const Vector<T>& a, const Vector<T>& b) {
  return a.size() == b.size() &&
         (a.empty() || !std::memcmp(a.data(), b.data(), a.size() * sizeof(T)));
}

class Cuda : public ::testing::Test {
 protected:
  // Few blocks, so that they take more than one row.
  Cuda() { cuda::set_grid_limit(3); }
  void SetUp() override {
    if (const char* reason = why_not()) GTEST_SKIP() << reason;
  }
};

template <class T>
RowType row_type() {
  return sizeof(T) == 2 ? RowType::bf16 : sizeof(T) == 4 ? RowType::f32 : RowType::f64;
}

template <class T, class Weight>
void check_segment_sum(std::int64_t segments, std::int64_t hidden) {
  SCOPED_TRACE(::testing::Message() << segments << " segments x " << hidden);
  Vector<std::int64_t> offset(1, 0);
  for (std::int64_t s = 0; s < segments; ++s) offset.push_back(offset.back() + s % 4);
  const std::int64_t rows = offset.back();
  Vector<std::int64_t> index(static_cast<std::size_t>(rows));
  std::iota(index.begin(), index.end(), std::int64_t{0});
  std::shuffle(index.begin(), index.end(), std::mt19937(1));
  const auto draw = [&](std::int64_t count, unsigned seed) {
    const auto floats = normal<float>(count, seed);
    Vector<T> out(floats.size());
    for (std::size_t i = 0; i < out.size(); ++i) {
      if constexpr (std::is_same_v<T, double>)
        out[i] = floats[i];
      else
        out[i] = from_float<T>(floats[i]);
    }
    return out;
  };
  const auto in = draw(rows * hidden, 2), grad = draw(segments * hidden, 3);
  Vector<Weight> weight(static_cast<std::size_t>(rows));
  for (std::size_t i = 0; i < weight.size(); ++i) weight[i] = Weight(0.3) + Weight(i % 7);
  for (const bool weighted : {false, true}) {
    for (const bool indexed : {false, true}) {
      const void* w = weighted ? weight.data() : nullptr;
      const std::int64_t* at = indexed ? index.data() : nullptr;
      Vector<T> want(grad.size()), got(grad.size());
      segment_sum(row_type<T>(), want.data(), in.data(), hidden, offset.data(), segments, at, w);
      cuda::segment_sum(row_type<T>(), got.data(), in.data(), hidden, offset.data(), segments, at,
                        w, nullptr);
      EXPECT_TRUE(same(want, got));
      Vector<T> grad_in(in.size()), got_in(in.size());
      Vector<Weight> grad_weight(weight.size()), got_weight(weight.size());
      segment_sum_backward(row_type<T>(), grad_in.data(), grad_weight.data(), grad.data(),
                           in.data(), hidden, offset.data(), segments, at, w);
      cuda::segment_sum_backward(row_type<T>(), got_in.data(), got_weight.data(), grad.data(),
                                 in.data(), hidden, offset.data(), segments, at, w, nullptr);
      EXPECT_TRUE(same(grad_in, got_in));
      for (std::size_t i = 0; i < grad_weight.size(); ++i) {
        // Sums of `hidden` products of about 1 in another order.
        EXPECT_NEAR(grad_weight[i], got_weight[i], 2e-6 * std::sqrt(double(hidden)) * 10);
      }
    }
  }
}

TEST_F(Cuda, SegmentSum) {
  for (const std::int64_t segments : kRows) {
    for (const std::int64_t hidden : kHidden) {
      if (segments * hidden > 200000) continue;
      check_segment_sum<float, float>(segments, hidden);
      check_segment_sum<Bfloat16, float>(segments, hidden);
      check_segment_sum<double, double>(segments, hidden);
    }
  }
  check_segment_sum<float, float>(4097, 16);
  check_segment_sum<Bfloat16, float>(7, 1);
}

TEST_F(Cuda, GatherScatterConvert) {
  for (const std::int64_t rows : kRows) {
    for (const std::size_t row_bytes : {std::size_t{3}, std::size_t{16}, std::size_t{200}}) {
      Vector<std::uint8_t> in((static_cast<std::size_t>(rows) + 5) * row_bytes);
      for (std::size_t i = 0; i < in.size(); ++i) in[i] = static_cast<std::uint8_t>(i * 7);
      auto index = some_index(rows, rows + 5, 1);
      Vector<std::uint8_t> want(in.size(), 1), got(in.size(), 1);
      gather_rows(want.data(), in.data(), index.data(), rows, row_bytes);
      cuda::gather_rows(got.data(), in.data(), index.data(), rows, row_bytes, nullptr);
      EXPECT_TRUE(same(want, got));
      std::iota(index.begin(), index.end(), std::int64_t{5});
      scatter_rows(want.data(), index.data(), in.data(), rows, row_bytes);
      cuda::scatter_rows(got.data(), index.data(), in.data(), rows, row_bytes, nullptr);
      EXPECT_TRUE(same(want, got));
    }
    for (const std::int64_t extra : {0, 1, 3}) {
      const auto wide = normal<float>(rows * 100 + extra, 2);
      Vector<Bfloat16> want(wide.size()), got(wide.size());
      convert(want.data(), wide.data(), static_cast<std::int64_t>(wide.size()));
      cuda::convert(got.data(), wide.data(), static_cast<std::int64_t>(wide.size()), nullptr);
      EXPECT_TRUE(same(want, got));
      Vector<float> back(wide.size()), got_back(wide.size());
      convert(back.data(), want.data(), static_cast<std::int64_t>(wide.size()));
      cuda::convert(got_back.data(), want.data(), static_cast<std::int64_t>(wide.size()), nullptr);
      EXPECT_TRUE(same(back, got_back));
    }
  }
}

// Noise of a row: compress/noise.hpp.
NoiseKey noise_key(std::uint64_t stream, const void* row, std::size_t bytes) {
  const std::uint32_t low = checksum(row, bytes, stream);
  return {low, checksum(&low, sizeof low, ~stream)};
}

// Rows of all magnitudes; some zero, some with outliers, some that are their base.
template <class T>
Vector<T> mixed_rows(std::int64_t rows, std::int64_t hidden, unsigned seed) {
  auto x = normal<float>(rows * hidden, seed);
  for (std::int64_t i = 0; i < rows; ++i) {
    float* row = x.data() + i * hidden;
    const float scale = i % 5 == 1 ? 1e-30F : i % 5 == 2 ? 1e30F : i % 7 == 3 ? 0.0F : 1.0F;
    for (std::int64_t j = 0; j < hidden; ++j) row[j] *= scale;
    if (i % 4 == 0) row[i % hidden] *= 1000;
  }
  Vector<T> out(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) out[i] = from_float<T>(x[i]);
  return out;
}

// One group of rows, coded on both sides.
template <class T>
void check_rows(std::int64_t count, std::int64_t hidden, float group_step, double max_error,
                bool ordered, bool dithered) {
  SCOPED_TRACE(::testing::Message() << count << " rows x " << hidden << ", step " << group_step
                                    << ", max_error " << max_error << ", ordered " << ordered
                                    << ", dithered " << dithered << ", bytes " << sizeof(T));
  const auto n = static_cast<std::size_t>(count), h = static_cast<std::size_t>(hidden);
  const auto x = mixed_rows<T>(count, hidden, 5);
  constexpr int kBases = 3;
  auto bases = normal<float>(kBases * hidden, 6, 0.5F);
  std::fill_n(bases.begin(), hidden, 0.0F);
  Vector<std::int32_t> order(h), place(h), id(n);
  std::iota(order.begin(), order.end(), 0);
  if (ordered) std::shuffle(order.begin(), order.end(), std::mt19937(7));
  for (std::size_t j = 0; j < h; ++j) place[static_cast<std::size_t>(order[j])] = int(j);
  for (std::size_t i = 0; i < n; ++i) id[i] = static_cast<std::int32_t>(i % kBases);

  // The CPU's.
  const StepCode steps(group_step, dithered, 0x12345678u);
  RowCoder<T> coder(hidden, steps, 1);
  const std::size_t record_bytes = coder.layout().record_bytes;
  Vector<double> squared(n), bound(n), error(n);
  Vector<Vector<std::uint8_t>> records(n), payloads(n);
  Vector<float> natural(h), coded(h);
  for (std::size_t i = 0; i < n; ++i) {
    convert(natural.data(), x.data() + i * h, hidden);
    squared[i] = squared_norm(natural.data(), hidden);
    bound[i] = max_error * (group_step > 0 ? std::sqrt(double(hidden)) : std::sqrt(squared[i]));
    for (std::size_t j = 0; j < h; ++j) coded[j] = natural[static_cast<std::size_t>(order[j])];
    records[i].resize(record_bytes);
    payloads[i].resize(coder.max_payload());
    const std::size_t bytes =
        coder.encode(records[i].data(), payloads[i].data(), coded.data(),
                     bases.data() + id[i] * hidden, natural.data(), bound[i], std::sqrt(squared[i]),
                     static_cast<std::uint32_t>(id[i]), &error[i]);
    payloads[i].resize(bytes);
  }

  // The GPU's.
  Vector<cuda::CodedGroup> groups(1);
  cuda::CodedGroup& group = groups[0];
  group.rows = count;
  group.step = group_step;
  group.dithered = dithered;
  group.dither_key = 0x12345678u;
  group.id_bytes = 1;
  group.centroids = kBases - 1;
  group.order = ordered ? order.data() : nullptr;
  group.place = ordered ? place.data() : nullptr;
  group.bases = bases.data();
  const cuda::RowsOf<T> rows{x.data(), nullptr, count, count, hidden};
  Vector<double> got_squared(n), got_error(n);
  cuda::squared_norms(got_squared.data(), rows, nullptr);
  EXPECT_TRUE(same(squared, got_squared));
  Vector<std::uint8_t> got_records(n * 600), whole(n);
  const std::int64_t stride = (hidden * 4 + 31) / 16 * 16;
  Vector<std::uint8_t> got_payloads(n * static_cast<std::size_t>(stride) + 16);
  Vector<std::int64_t> sizes(n);
  cuda::encode_rows<T>({got_records.data(), 600, got_payloads.data(), stride, sizes.data(),
                        whole.data(), got_error.data()},
                       rows, groups.data(), 1, squared.data(), bound.data(), id.data(), nullptr);
  EXPECT_TRUE(same(error, got_error));
  Vector<std::uint8_t> directory, body;
  for (std::size_t i = 0; i < n; ++i) {
    const Vector<std::uint8_t> record(got_records.begin() + long(i) * 600,
                                      got_records.begin() + long(i * 600 + record_bytes));
    EXPECT_EQ(record, records[i]) << i;
    ASSERT_EQ(sizes[i], std::int64_t(payloads[i].size())) << i;
    EXPECT_EQ(whole[i] != 0, coder.is_whole(record.data())) << i;
    if (!whole[i]) {
      const auto from = got_payloads.begin() + long(i) * stride;
      EXPECT_EQ(Vector<std::uint8_t>(from, from + sizes[i]), payloads[i]) << i;
    }
    directory.insert(directory.end(), records[i].begin(), records[i].end());
    body.insert(body.end(), payloads[i].begin(), payloads[i].end());
  }

  // And back, from an odd address, to shuffled rows.
  Vector<std::uint8_t> stream(1, 0);
  stream.insert(stream.end(), directory.begin(), directory.end());
  stream.insert(stream.end(), body.begin(), body.end());
  group.records = stream.data() + 1;
  group.payloads = group.records + directory.size();
  group.end = stream.data() + stream.size();
  Vector<std::int64_t> found(n), offset(n), to(n), bad(cuda::kBadKinds, count);
  cuda::record_sizes(found.data(), bad.data(), groups.data(), 1, count, hidden, sizeof(T), nullptr);
  EXPECT_EQ(found, sizes);
  Vector<cuda::RowTotals> totals(1);
  const cuda::RowTotals& total = totals[0];
  cuda::row_totals(totals.data(), offset.data(), groups.data(), 1, groups.data(), 1, nullptr, count,
                   found.data(), whole.data(), squared.data(), bound.data(), error.data(), nullptr);
  EXPECT_EQ(total.payload_bytes, std::int64_t(body.size()));
  EXPECT_EQ(total.bad_row, -1);
  double sum = 0;
  for (std::size_t i = 0; i < n; ++i) sum += squared[i] > 0 ? error[i] / std::sqrt(squared[i]) : 0;
  EXPECT_NEAR(total.relative_sum, sum, 1e-12 * sum);
  std::iota(to.begin(), to.end(), std::int64_t{0});
  std::shuffle(to.begin(), to.end(), std::mt19937(8));
  Vector<T> want(x.size()), got(x.size()), ordered_row(h);
  for (std::size_t i = 0; i < n; ++i) {
    T* row = want.data() + static_cast<std::size_t>(to[i]) * h;
    payloads[i].resize(payloads[i].size() + 8);
    (void)coder.payload_bytes(records[i].data());
    coder.decode(ordered_row.data(), records[i].data(), payloads[i].data(), payloads[i].size(),
                 bases.data() + id[i] * hidden);
    const bool as_is = coder.is_whole(records[i].data());
    for (std::size_t j = 0; j < h; ++j) {
      row[as_is ? j : static_cast<std::size_t>(order[j])] = ordered_row[j];
    }
  }
  cuda::decode_rows(got.data(), to.data(), count, bad.data(), groups.data(), 1, offset.data(),
                    count, hidden, nullptr);
  EXPECT_TRUE(same(want, got));
  for (const std::int64_t row : bad) EXPECT_EQ(row, count);
}

template <class T>
void check_all_rows(std::int64_t count, std::int64_t hidden) {
  for (const double max_error : {0.1, 1e-6, 0.5}) {
    for (const bool ordered : {false, true}) {
      check_rows<T>(count, hidden, 0, max_error, ordered, false);
    }
  }
  check_rows<T>(count, hidden, 0.5F, 0.1, true, false);
  check_rows<T>(count, hidden, 0, 0.2, true, true);
  check_rows<T>(count, hidden, 0.5F, 0.1, false, true);
}

TEST_F(Cuda, Rows) {
  for (const std::int64_t hidden : {1, 16, 100, 384}) {
    check_all_rows<float>(33, hidden);
    check_all_rows<Bfloat16>(33, hidden);
  }
  for (const std::int64_t count : {0, 1, 31, 32, 200})
    check_rows<float>(count, 100, 0, 0.1, true, false);
  check_all_rows<float>(5, 4096);
  check_all_rows<Bfloat16>(5, 4096);
  check_all_rows<float>(5, 1037);
  check_rows<Bfloat16>(4097, 16, 0, 0.1, true, false);
}

// Against the CPU's search and bands: what the plan of a group is chosen by.
TEST_F(Cuda, Estimates) {
  for (const std::int64_t hidden : {100, 1040}) {
    const std::int64_t count = 13, stride = 3;
    const auto x = normal<float>(count * hidden, 1), base = normal<float>(2 * hidden, 2, 0.1F);
    Vector<std::int32_t> order(static_cast<std::size_t>(hidden)), id(13, 1);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), std::mt19937(3));
    RowCoder<float> coder(hidden, StepCode(), 0);
    Vector<double> bound(13, 0.1 * std::sqrt(double(hidden)));
    bound[3] = 0;
    bound[6] = 1e6;
    std::int64_t want[2] = {};
    Vector<std::int64_t> got(2);
    for (std::int64_t i = 0; i < count; i += stride) {
      Vector<float> r;
      for (std::int64_t j = 0; j < hidden; ++j) {
        r.push_back(x[static_cast<std::size_t>(i * hidden + j)] -
                    base[static_cast<std::size_t>(hidden + j)]);
      }
      std::int64_t plain = 0, ordered = 0;
      coder.estimate(r.data(), bound[static_cast<std::size_t>(i)], order.data(), &plain, &ordered);
      want[0] += plain;
      want[1] += ordered;
    }
    Vector<cuda::CodedGroup> groups(1);
    cuda::CodedGroup& group = groups[0];
    group.rows = count;
    group.bases = base.data();
    cuda::estimate_rows<float>(got.data(), {x.data(), nullptr, count, count, hidden}, stride,
                               groups.data(), bound.data(), id.data(), order.data(), sizeof(float),
                               nullptr);
    EXPECT_EQ(got[0], want[0]);
    EXPECT_EQ(got[1], want[1]);
    EXPECT_NE(got[0], got[1]);
  }
}

TEST_F(Cuda, Bounds) {
  Vector<double> squared;
  for (int i = 0; i < 1500; ++i) squared.push_back(1.0 + i % 17);
  Vector<cuda::CodedGroup> groups(3);
  const std::int64_t first[] = {0, 20, 21, 1500};
  for (std::size_t g = 0; g < 3; ++g) {
    groups[g].first = first[g];
    groups[g].rows = first[g + 1] - first[g];
  }
  // The last two rows of the first group are all of that kind.
  for (std::size_t i = 0; i < 20; ++i) squared[i] = i < 18 ? 0 : 1e7;
  Vector<double> bound(1500), norm(1500), cap(1);
  for (std::size_t i = 0; i < 1500; ++i) norm[i] = std::sqrt(squared[i]);
  for (const bool capped : {false, true}) {
    cap[0] = capped ? norm_cap(squared.data(), nullptr, 1500) : HUGE_VAL;
    const double* given = capped ? cap.data() : nullptr;
    cuda::row_bounds(bound.data(), groups.data(), 3, squared.data(), given, 0.25, false, 64,
                     nullptr);
    for (std::size_t i = 0; i < 1500; ++i) EXPECT_EQ(bound[i], 0.25 * std::min(norm[i], cap[0]));
    cuda::row_bounds(bound.data(), groups.data(), 3, squared.data(), given, 0.25, true, 64,
                     nullptr);
    for (std::size_t g = 0; g < 3; ++g) {
      const double want = 0.25 * group_reference(norm.data() + first[g], groups[g].rows, cap[0]);
      for (std::int64_t i = first[g]; i < first[g + 1]; ++i) {
        EXPECT_EQ(bound[static_cast<std::size_t>(i)], want);
      }
      EXPECT_EQ(groups[g].step, group_step(want, 64));
    }
  }
}

TEST_F(Cuda, NormCap) {
  for (const std::int64_t rows : kRows) {
    for (const std::string kind : {"all", "zeros", "all zero", "bad"}) {
      const auto exponents = normal<float>(rows, 3, 40);
      Vector<double> squared;
      for (std::int64_t i = 0; i < rows; ++i) {
        const double value = std::exp2(double{exponents[static_cast<std::size_t>(i)]});
        const bool zero = kind == "all zero" || (kind == "zeros" && i % 3 != 0);
        squared.push_back(zero                          ? 0.0
                          : kind == "bad" && i % 5 == 0 ? HUGE_VAL * (i % 2 == 0 ? 1 : 0)
                                                        : value);
      }
      Vector<double> cap(1, -1);
      cuda::find_norm_cap(cap.data(), squared.data(), nullptr, rows, rows, nullptr);
      EXPECT_EQ(cap[0], norm_cap(squared.data(), nullptr, rows)) << rows << " " << kind;
      if (rows == 0) continue;
      Vector<std::int64_t> number;
      for (std::int64_t i = 0; i < 2 * rows; ++i) number.push_back(i * i % rows);
      cuda::find_norm_cap(cap.data(), squared.data(), number.data(), 2 * rows, rows, nullptr);
      EXPECT_EQ(cap[0], norm_cap(squared.data(), number.data(), 2 * rows)) << rows << " " << kind;
    }
  }
}

template <class T>
void check_format(RowFormat format, std::int64_t count, std::int64_t hidden, bool dithered) {
  SCOPED_TRACE(::testing::Message() << int(format) << ": " << count << " rows x " << hidden
                                    << ", dithered " << dithered << ", bytes " << sizeof(T));
  const auto n = static_cast<std::size_t>(count), h = static_cast<std::size_t>(hidden);
  const auto x = mixed_rows<T>(count, hidden, 9);
  const std::size_t row_bytes = format_row_bytes(format, hidden);
  Vector<std::uint8_t> want(n * row_bytes), got(3 + n * row_bytes);
  Vector<T> decoded(x.size()), got_decoded(x.size());
  Vector<double> squared(n), error(n);
  for (std::size_t i = 0; i < n; ++i) {
    Vector<float> row(h);
    convert(row.data(), x.data() + i * h, hidden);
    const NoiseKey key = noise_key(77, x.data() + i * h, h * sizeof(T));
    encode_row(format, want.data() + i * row_bytes, row.data(), hidden, dithered ? &key : nullptr);
    ASSERT_TRUE(decode_row(format, decoded.data() + i * h, want.data() + i * row_bytes, hidden));
    const double norm = squared_norm(row.data(), hidden);
    error[i] = std::sqrt(squared_distance(row.data(), decoded.data() + i * h, hidden));
    squared[i] = norm;
  }
  Vector<cuda::ParcelPlace> places(1);
  cuda::ParcelPlace& place = places[0];
  place.rows = count;
  place.head_copied = place.head_bytes = 3;
  Vector<double> got_squared(n), got_error(n);
  cuda::encode_format<T>(format, got.data(), places.data(), 1, got_squared.data(), got_error.data(),
                         {x.data(), nullptr, count, count, hidden}, {dithered, 77}, nullptr);
  EXPECT_EQ(Vector<std::uint8_t>(got.begin() + 3, got.end()), want);
  for (std::size_t i = 0; i < n; ++i) {
    // Statistics only: summed in another order.
    EXPECT_NEAR(got_squared[i], squared[i], 1e-12 * squared[i]);
    EXPECT_NEAR(got_error[i], error[i], 1e-12 * error[i]);
  }
  const Vector<cuda::RawPlace> from(1, {0, count, got.data() + 3});
  Vector<std::int64_t> bads(1, count);
  const std::int64_t& bad = bads[0];
  cuda::decode_format(format, got_decoded.data(), nullptr, count, bads.data(), from.data(), 1,
                      count, hidden, nullptr);
  EXPECT_EQ(bad, count);
  EXPECT_TRUE(same(decoded, got_decoded));
  if (count < 3) return;
  // Bytes that are never written: as a scale NaN, as a code -128 or NaN.
  std::fill_n(got.begin() + 3 + long(2 * row_bytes), row_bytes,
              std::uint8_t(format == RowFormat::int8 ? 0x80 : 0x7F));
  if (format != RowFormat::int8) got[3 + 2 * row_bytes + (format == RowFormat::fp8 ? 3 : 1)] = 0x7F;
  cuda::decode_format(format, got_decoded.data(), nullptr, count, bads.data(), from.data(), 1,
                      count, hidden, nullptr);
  EXPECT_EQ(bad, 2);
}

TEST_F(Cuda, Formats) {
  for (const RowFormat format : {RowFormat::fp8, RowFormat::int8, RowFormat::int4}) {
    for (const std::int64_t hidden : {1, 16, 37, 100, 127, 128, 384}) {
      for (const bool dithered : {false, true}) {
        check_format<float>(format, 33, hidden, dithered);
        check_format<Bfloat16>(format, 31, hidden, dithered);
      }
    }
    check_format<Bfloat16>(format, 3, 4096, false);
    check_format<float>(format, 0, 16, false);
    check_format<float>(format, 1, 16, false);
  }
}

TEST_F(Cuda, NearestCentroid) {
  for (const std::int64_t rows : {0, 1, 31, 33, 200}) {
    for (const std::int64_t count : {1, 15, 64, 65, 200}) {
      for (const std::int64_t columns : {1, 24, 64}) {
        auto z = normal<float>(rows * columns, 1);
        auto c = normal<float>(count * columns, 2);
        const auto mean = normal<float>(columns, 3);
        // Ties: every third centroid twice.
        for (std::int64_t k = 3; k < count; k += 3) {
          std::copy_n(c.begin() + (k - 1) * columns, columns, c.begin() + k * columns);
        }
        Vector<std::int64_t> want(static_cast<std::size_t>(rows));
        Vector<float> scratch(static_cast<std::size_t>(nearest_scratch(count, columns)));
        Vector<float> half(static_cast<std::size_t>(count));
        Vector<std::int32_t> got(want.size());
        cuda::half_norms(half.data(), c.data(), count, columns, nullptr);
        cuda::nearest_centroid(got.data(), z.data(), mean.data(), c.data(), half.data(), rows,
                               count, columns, nullptr);
        for (std::size_t i = 0; i < z.size(); ++i) z[i] -= mean[i % std::size_t(columns)];
        nearest_centroid(want.data(), nullptr, scratch.data(), z.data(), c.data(), rows, count,
                         columns, /*or_none=*/true);
        for (std::size_t i = 0; i < want.size(); ++i) ASSERT_EQ(got[i], want[i] + 1) << i;
      }
    }
  }
}

TEST_F(Cuda, KeysAndMeans) {
  const std::int64_t rows = 300;
  const auto z = normal<float>(rows * 40, 1), x = normal<float>(rows * 150, 2);
  Vector<std::uint64_t> want(300), got(300);
  bucket_keys(want.data(), z.data(), rows, 40, 3, 8);
  cuda::bucket_keys(got.data(), z.data(), rows, 40, 3, 8, nullptr);
  EXPECT_EQ(want, got);
  Vector<std::int64_t> order(300), offsets(301);
  const std::int64_t groups = group_by_key(order.data(), offsets.data(), want.data(), rows);
  Vector<float> mean(static_cast<std::size_t>(groups * 150)), got_mean(mean.size());
  segment_mean(mean.data(), x.data(), order.data(), offsets.data(), groups, 150);
  cuda::segment_mean(got_mean.data(), x.data(), order.data(), offsets.data(), groups, 150, nullptr);
  EXPECT_TRUE(same(mean, got_mean));
  const Vector<std::int64_t> all = {0, rows, rows};
  segment_mean(mean.data(), x.data(), order.data(), all.data(), 2, 150);
  cuda::segment_mean(got_mean.data(), x.data(), order.data(), all.data(), 2, 150, nullptr);
  EXPECT_TRUE(std::equal(mean.begin(), mean.begin() + 300, got_mean.begin()));
}

TEST_F(Cuda, ChannelOrder) {
  for (const std::int64_t hidden : {17, 100, 384, 4096}) {
    constexpr std::int64_t kGroups = 4;
    auto energy = normal<float>(kGroups * hidden, 5);
    for (float& value : energy) value = std::floor(4 * value * value);  // many equal ones
    Vector<std::int32_t> order(energy.size()), place(energy.size());
    cuda::order_channels(order.data(), place.data(), energy.data(), kGroups, hidden, nullptr);
    for (std::int64_t g = 0; g < kGroups; ++g) {
      const float* own = energy.data() + g * hidden;
      Vector<std::int32_t> want(static_cast<std::size_t>(hidden));
      std::iota(want.begin(), want.end(), 0);
      std::stable_sort(want.begin(), want.end(),
                       [own](std::int32_t a, std::int32_t b) { return own[a] > own[b]; });
      for (std::int64_t from = 0; from < hidden; from += kBandValues) {
        std::sort(want.begin() + from, want.begin() + std::min(hidden, from + kBandValues));
      }
      EXPECT_TRUE(std::equal(want.begin(), want.end(), order.begin() + g * hidden)) << hidden;
      for (std::int64_t j = 0; j < hidden; ++j) {
        ASSERT_EQ(place[static_cast<std::size_t>(g * hidden + want[std::size_t(j)])], j);
      }
    }
  }
}

TEST_F(Cuda, IndexOutOfRange) {
  Vector<std::int64_t> index(1000, 3);
  Vector<std::int64_t> bads(1, INT64_MAX);
  const std::int64_t& bad = bads[0];
  cuda::check_index(bads.data(), index.data(), 1000, 4, nullptr);
  EXPECT_EQ(bad, INT64_MAX);
  index[700] = -1;
  index[650] = 4;
  cuda::check_index(bads.data(), index.data(), 1000, 4, nullptr);
  EXPECT_EQ(bad, 650);
}

TEST_F(Cuda, Checksums) {
  std::mt19937 random(1);
  Vector<std::uint8_t> data(9000);
  for (auto& byte : data) byte = static_cast<std::uint8_t>(random());
  for (const std::size_t shift : {0, 1, 5}) {
    Vector<cuda::ChecksumSpan> spans;
    Vector<std::uint8_t> sums(1000);
    Vector<std::uint32_t> want;
    std::int64_t blocks = 0;
    for (const std::size_t size : {1, 7, 8, 31, 32, 33, 1023, 1024, 1025, 5000}) {
      spans.push_back(
          {data.data() + shift, std::int64_t(size), 42, sums.data() + 4 * blocks, blocks});
      for (std::size_t from = 0; from < size; from += 1024) {
        const std::size_t part = std::min<std::size_t>(1024, size - from);
        want.push_back(checksum(data.data() + shift + from, part, size <= 1024 ? 42 : 0));
        ++blocks;
      }
    }
    cuda::checksum_blocks(spans.data(), std::int64_t(spans.size()), blocks, nullptr);
    EXPECT_EQ(std::memcmp(sums.data(), want.data(), 4 * want.size()), 0) << shift;
  }
}

}  // namespace
}  // namespace lshmoe::kernels
