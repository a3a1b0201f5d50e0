#pragma once
// Codecs of GPU rows against the CPU's: by the kernels on the host (cuda_on_host_test), and on a
// GPU (cuda_codec_test). `same_bytes`: the products with the projection have the CPU's bits.

#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <numeric>
#include <optional>

#include "lshmoe/comm/self/self.hpp"
#include "lshmoe/compress/codec.hpp"
#include "lshmoe/runtime/error.hpp"
#include "tests/compress/rows.hpp"
#include "tests/support/errors.hpp"

namespace lshmoe::testing {

using MakeCodec = std::function<std::shared_ptr<Codec>(const CodecOptions&, const CodecContext&)>;

struct CudaChecks {
  MakeCodec make;
  at::Device device = at::kCPU;
  bool same_bytes = true;
  /// Rows and hidden sizes by what the fibres can bear.
  std::vector<int64_t> hidden{16, 100};

  [[nodiscard]] at::Tensor there(const at::Tensor& x) const { return x.to(device); }

  /// True where the CPU found that rows explain themselves in less than with the state: it tries
  /// that, the GPU does not.
  static bool explained(const Encoded& encoded) {
    const auto bytes = bytes_of(encoded.bytes);
    std::size_t begin = 0;
    for (const int64_t size : encoded.bytes_per_group) {
      if (size > 0 && field<uint32_t>(bytes.data() + begin, 20) == 0) return true;
      begin += static_cast<std::size_t>(size);
    }
    return false;
  }
  /// Calls of both_ways with a state, and those of them that compared bytes.
  mutable int64_t with_state = 0, compared = 0;

  /// x, in groups of these rows: both ways between CPU and GPU, equal results.
  void both_ways(const CodecOptions& options, const CodecContext& context, const at::Tensor& x,
                 const at::Tensor& index, const std::vector<int64_t>& rows_per_group,
                 const at::Tensor& fit = {}) const {
    CodecContext on_gpu = context;
    on_gpu.device = device;
    const auto cpu = make_codec(options, context), gpu = make(options, on_gpu);
    if (fit.defined()) {
      cpu->observe(fit, {});
      gpu->observe(there(fit), {});
      ASSERT_TRUE(cpu->refresh(*make_self_communicator()));
      ASSERT_TRUE(gpu->refresh(*make_self_communicator()));
    }
    const Encoded want = cpu->encode(x, index, rows_per_group);
    const Encoded got =
        gpu->encode(there(x), index.defined() ? there(index) : index, rows_per_group);
    EXPECT_EQ(got.bytes.device().type(), device.type());
    EXPECT_EQ(got.stats.staged_bytes, 0);
    EXPECT_EQ(got.stats.rows, want.stats.rows);
    EXPECT_EQ(got.stats.raw_bytes, want.stats.raw_bytes);
    EXPECT_EQ(got.stats.sent_bytes, got.bytes.numel());
    EXPECT_LE(got.stats.max_error_ratio, 1.0);
    const at::Tensor bytes = got.bytes.cpu();
    const bool own_ways = fit.defined() && explained(want);
    with_state += fit.defined() ? 1 : 0;
    compared += fit.defined() && !own_ways ? 1 : 0;
    if (same_bytes && !own_ways) {
      EXPECT_EQ(got.bytes_per_group, want.bytes_per_group);
      EXPECT_EQ(bytes_of(bytes), bytes_of(want.bytes));
      EXPECT_EQ(got.stats.whole_rows, want.stats.whole_rows);
      EXPECT_NEAR(got.stats.mean_relative_error, want.stats.mean_relative_error,
                  1e-9 * want.stats.mean_relative_error);
      EXPECT_NEAR(got.stats.max_relative_error, want.stats.max_relative_error,
                  1e-9 * want.stats.max_relative_error);
      EXPECT_NEAR(got.stats.max_error_ratio, want.stats.max_error_ratio, 1e-9);
    }
    // Again: the same bytes.
    EXPECT_EQ(bytes_of(gpu->encode(there(x), index, rows_per_group).bytes.cpu()), bytes_of(bytes));

    // The CPU decodes the GPU's parcels, and the other way round, to the same rows.
    const auto rows = std::accumulate(rows_per_group.begin(), rows_per_group.end(), int64_t{0});
    const at::Tensor to = at::randperm(rows, at::kLong);
    for (const Encoded* from : {&want, &got}) {
      at::Tensor here = at::full({rows, x.size(1)}, 7, x.options());
      at::Tensor out = there(here).clone();
      cpu->decode_into(here, to, from->bytes.cpu(), from->bytes_per_group, rows_per_group);
      gpu->decode_into(out, there(to), there(from->bytes), from->bytes_per_group, rows_per_group);
      EXPECT_EQ(bytes_of(out.cpu()), bytes_of(here));
      const Decoded short_form = gpu->decode(there(from->bytes), from->bytes_per_group);
      EXPECT_EQ(short_form.rows_per_group, rows_per_group);
      EXPECT_EQ(bytes_of(short_form.rows.cpu()), bytes_of(here.index_select(0, to)));
    }
  }

  /// One bit after the other turned over, checksums mended: both refuse, or both decode the same.
  void damage(const CodecOptions& options, const CodecContext& context, const at::Tensor& x,
              const at::Tensor& fit = {}) const {
    CodecContext on_gpu = context;
    on_gpu.device = device;
    const auto cpu = make_codec(options, context), gpu = make(options, on_gpu);
    if (fit.defined()) {
      cpu->observe(fit, {});
      gpu->observe(there(fit), {});
      ASSERT_TRUE(cpu->refresh(*make_self_communicator()));
      ASSERT_TRUE(gpu->refresh(*make_self_communicator()));
    }
    const auto good = bytes_of(gpu->encode(there(x), {x.size(0)}).bytes.cpu());
    const auto decoded = [](const Codec& codec, const at::Tensor& bytes) {
      std::optional<std::vector<uint8_t>> rows;
      try {
        rows = bytes_of(codec.decode(bytes, {bytes.numel()}).rows.cpu());
      } catch (const InvalidArgument&) {
      }
      return rows;
    };
    int64_t refused = 0, accepted = 0;
    for (std::size_t at = 0; at < good.size(); at += at < 300 ? 1 : 7) {
      for (const bool mended : {false, true}) {
        auto bytes = good;
        bytes[at] ^= static_cast<uint8_t>(1 << at % 8);
        if (mended) reseal(bytes.data(), bytes.size());
        const auto here = decoded(*cpu, to_tensor(bytes));
        const auto out = decoded(*gpu, there(to_tensor(bytes)));
        EXPECT_EQ(here.has_value(), out.has_value()) << at;
        if (here && out) {
          EXPECT_EQ(*here, *out) << at;
        }
        ++(here ? accepted : refused);
      }
    }
    EXPECT_GT(refused, 0);
    // Cut at the end, with and without a header that knows it.
    for (std::size_t cut : {1, 3, 8}) {
      auto bytes = good;
      bytes.resize(good.size() - cut);
      EXPECT_FALSE(decoded(*gpu, there(to_tensor(bytes))).has_value());
      const auto body = field<uint64_t>(bytes.data(), 24) - cut;
      std::memcpy(bytes.data() + 24, &body, 8);
      reseal(bytes.data(), bytes.size());
      EXPECT_FALSE(decoded(*gpu, there(to_tensor(bytes))).has_value());
    }
  }

  void fixed_kinds() const {
    for (const std::string kind : {"none", "bf16", "fp8", "int8", "int4"}) {
      for (const auto dtype : {at::kFloat, at::kBFloat16, at::kDouble}) {
        if (dtype == at::kDouble && kind != "none") continue;
        for (const int64_t h : hidden) {
          for (const std::string rounding : {"nearest", "stochastic"}) {
            if ((kind == "bf16" || kind == "none") && rounding == "stochastic") continue;
            SCOPED_TRACE(kind + " " + std::to_string(h) + " " + rounding);
            const auto options = CodecOptions().kind(kind).rounding(rounding).seed(3);
            const CodecContext context{h, 1, Direction::combine, dtype};
            const at::Tensor x = make_rows("outliers", 40, h, 1).to(dtype);
            both_ways(options, context, x, {}, {3, 0, 36, 1});
            both_ways(options, context, x, at::randint(40, {33}, at::kLong), {0, 32, 1});
            both_ways(options, context, x.slice(0, 0, 0), {}, {0, 0});
            const at::Tensor odd = x.slice(0, 0, 5).slice(1, 0, h - 3).contiguous();
            both_ways(options, {h - 3, 1, Direction::combine, dtype}, odd, {}, {2, 3});
          }
        }
      }
    }
  }

  void rows_within_a_bound() const {
    for (const auto dtype : {at::kFloat, at::kBFloat16}) {
      for (const int64_t h : hidden) {
        const at::Tensor fit = clustered(700, h, 20, 0.3, 1).to(dtype);
        for (const std::string reference : {"row", "group"}) {
          for (const std::string rounding : {"nearest", "dithered"}) {
            for (const double max_error : {0.0, 0.02, 0.1}) {
              SCOPED_TRACE(reference + " " + rounding + " " + std::to_string(h) + " " +
                           std::to_string(max_error) + " " + c10::toString(dtype));
              const auto options = CodecOptions()
                                       .state("learned")
                                       .codebook_size(40)
                                       .error_reference(reference)
                                       .rounding(rounding)
                                       .max_error(max_error);
              const CodecContext context{h, 0, Direction::dispatch, dtype};
              const at::Tensor x = clustered(80, h, 20, 0.3, 1).to(dtype);
              const at::Tensor state = max_error > 0 ? fit : at::Tensor();
              both_ways(options, context, x, {}, {30, 0, 50}, state);
              both_ways(options, context, x, at::randperm(80, at::kLong).slice(0, 0, 65), {64, 1},
                        state);
              both_ways(options, context, x.slice(0, 0, 0), {}, {0}, state);
              // Outliers of which the median of the call knows: rows of x are sent more than once,
              // or not at all.
              at::Tensor outliers = x.clone();
              outliers.slice(0, 30, 75).mul_(50);
              outliers.slice(0, 0, 5).zero_();
              const at::Tensor often =
                  at::cat({at::arange(40, at::kLong), at::arange(50, at::kLong)});
              both_ways(options, context, outliers, often, {40, 50}, state);
            }
          }
        }
      }
    }
    EXPECT_GT(3 * compared, 2 * with_state);  // or the test has lost its point
  }

  /// Rows of every kind: zeros, outliers, tiny, huge; the parcels decode within the bound.
  void all_kinds_of_rows() const {
    const int64_t h = hidden.back();
    const auto options = CodecOptions().state("learned").codebook_size(40);
    CodecContext context{h, 0, Direction::dispatch, at::kFloat, device};
    const auto gpu = make(options, context);
    gpu->observe(there(clustered(700, h, 20, 0.3, 1)), {});
    ASSERT_TRUE(gpu->refresh(*make_self_communicator()));
    for (const std::string& kind : row_kinds()) {
      const at::Tensor x = make_rows(kind, 50, h, 2);
      const Encoded encoded = gpu->encode(there(x), {20, 30});
      const at::Tensor y = gpu->decode(encoded.bytes, encoded.bytes_per_group).rows.cpu();
      const at::Tensor exact = x.to(at::kDouble);
      const at::Tensor error = (y.to(at::kDouble) - exact).norm(2, 1);
      EXPECT_TRUE((error <= 0.1 * references(x, {}, false)).all().item<bool>()) << kind;
      EXPECT_EQ(encoded.stats.staged_bytes, 0);
    }
  }

  void refusals() const {
    for (const std::string kind : {"int8", "lsh"}) {
      const auto options = CodecOptions().kind(kind).max_error(0);
      const auto gpu = make(options, {8, 4, Direction::dispatch, at::kFloat, device});
      at::Tensor x = gaussian(6, 8, 1);
      x[4][3] = std::numeric_limits<float>::infinity();
      expect_error("row 4 holds NaN or Inf", [&] { (void)gpu->encode(there(x), {6}); });
      const at::Tensor index = at::tensor({2, 0, 4}, at::kLong);
      expect_error("row 4 holds NaN or Inf", [&] {
        (void)gpu->encode(there(x), there(index), {1, 2});
      });
      const at::Tensor fine = at::tensor({2, 0, 5}, at::kLong);
      EXPECT_GT(gpu->encode(there(x), there(fine), {1, 2}).bytes.numel(), 0);
      const at::Tensor beyond = at::tensor({2, 6}, at::kLong);
      expect_error("row_index[1]", [&] { (void)gpu->encode(there(x), there(beyond), {2}); });
      const Encoded encoded = gpu->encode(there(x), there(fine), {3});
      at::Tensor out = there(at::zeros({3, 8}));
      const at::Tensor to = at::tensor({0, 3, 1}, at::kLong);
      expect_error("row_index[1]", [&] {
        gpu->decode_into(out, there(to), encoded.bytes, encoded.bytes_per_group, {3});
      });
      expect_error("holds 3 rows, expected 2", [&] {
        gpu->decode_into(out, there(to.slice(0, 0, 1).repeat(2)), encoded.bytes,
                         encoded.bytes_per_group, {2});
      });
    }
  }

  void damaged_parcels() const {
    for (const std::string kind : {"none", "bf16", "fp8", "int8", "int4"}) {
      SCOPED_TRACE(kind);
      damage(CodecOptions().kind(kind), {37, 0, Direction::dispatch, at::kFloat},
             gaussian(4, 37, 1));
    }
    const at::Tensor fit = clustered(700, 100, 20, 0.3, 1);
    damage(CodecOptions().max_error(0.2), {100, 0, Direction::combine, at::kFloat},
           clustered(60, 100, 2, 0.1, 1));
    for (const std::string reference : {"row", "group"}) {
      SCOPED_TRACE(reference);
      damage(CodecOptions().state("learned").codebook_size(40).error_reference(reference),
             {100, 0, Direction::dispatch, at::kFloat}, clustered(9, 100, 20, 0.3, 1), fit);
    }
  }

  /// Parcels that explain themselves, with and without clusters: the CPU encodes, both decode.
  void batch_parcels() const {
    for (const auto dtype : {at::kFloat, at::kBFloat16}) {
      for (const int64_t h : hidden) {
        for (const std::string reference : {"row", "group"}) {
          for (const int64_t clusters : {0, 128}) {
            const auto options =
                CodecOptions().error_reference(reference).max_clusters(clusters).max_error(0.2);
            CodecContext context{h, 0, Direction::dispatch, dtype};
            const auto cpu = make_codec(options, context);
            context.device = device;
            const auto gpu = make(options, context);
            at::Tensor x = clustered(300, h, 5, 0.1, 1);
            x.slice(0, 200, 240).copy_(make_rows("huge", 40, h, 2));
            x = x.to(dtype);
            const Encoded encoded = cpu->encode(x, {200, 0, 100});
            EXPECT_EQ(encoded.stats.clusters > 0, clusters > 0);
            const at::Tensor to = at::randperm(300, at::kLong);
            at::Tensor here = at::zeros_like(x), out = there(at::zeros_like(x));
            cpu->decode_into(here, to, encoded.bytes, encoded.bytes_per_group, {200, 0, 100});
            gpu->decode_into(out, there(to), there(encoded.bytes), encoded.bytes_per_group,
                             {200, 0, 100});
            EXPECT_EQ(bytes_of(out.cpu()), bytes_of(here));
          }
        }
      }
    }
  }

  /// What the GPU does not code itself says so.
  void staged() const {
    const CodecContext context{24, 0, Direction::dispatch, at::kFloat, device};
    const at::Tensor x = clustered(100, 24, 4, 0.1, 1);
    const auto gpu = make(CodecOptions().restore("source"), context);
    const Encoded encoded = gpu->encode(there(x), {100});
    EXPECT_EQ(encoded.stats.staged_bytes, static_cast<int64_t>(x.nbytes()) + encoded.bytes.numel());
    EXPECT_EQ(encoded.bytes.device().type(), device.type());
    EXPECT_EQ(bytes_of(gpu->decode(encoded.bytes, encoded.bytes_per_group).rows.cpu()),
              bytes_of(encoded.centroids.cpu()));
  }
};

}  // namespace lshmoe::testing
