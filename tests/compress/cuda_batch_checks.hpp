#pragma once
// GPU rows in parcels that explain themselves, against the CPU's codec. The GPU plans with sums in
// another order, so that bytes may differ; what they decode to, and the bound, may not.

#include "lshmoe/compress/lsh_codec.hpp"
#include "tests/compress/cuda_codec_checks.hpp"

namespace lshmoe::testing {

struct CudaBatchChecks : CudaChecks {
  /// A parcel may be larger or smaller than the CPU's by this part of it, and this many bytes.
  static constexpr double kPart = 0.02;
  static constexpr double kBytes = 64;

  /// Encodes on the GPU; the CPU decodes it within the bound, the GPU to the same rows.
  Encoded encode_batch(const CodecOptions& given, const CodecContext& context, const at::Tensor& x,
                       const at::Tensor& index, const std::vector<int64_t>& rows_per_group) const {
    const CodecOptions options = resolved(given, context.direction);
    CodecContext on_gpu = context;
    on_gpu.device = device;
    const auto cpu = make_codec(options, context), gpu = make(options, on_gpu);
    const auto encode = [&] {
      return gpu->encode(there(x), index.defined() ? there(index) : index, rows_per_group);
    };
    const Encoded want = cpu->encode(x, index, rows_per_group), got = encode();
    EXPECT_EQ(got.stats.staged_bytes, 0);
    EXPECT_EQ(got.stats.rows, want.stats.rows);
    EXPECT_EQ(got.stats.sent_bytes, got.bytes.numel());
    EXPECT_LE(got.stats.max_error_ratio, 1.0);
    EXPECT_EQ(bytes_of(encode().bytes.cpu()), bytes_of(got.bytes.cpu()));
    for (std::size_t g = 0; g < rows_per_group.size(); ++g) {
      const auto expected = static_cast<double>(want.bytes_per_group[g]);
      EXPECT_NEAR(static_cast<double>(got.bytes_per_group[g]), expected, kPart * expected + kBytes);
      EXPECT_EQ(got.bytes_per_group[g] == 0, rows_per_group[g] == 0);
    }

    const at::Tensor rows = index.defined() ? x.index_select(0, index) : x;
    const Decoded here = cpu->decode(got.bytes.cpu(), got.bytes_per_group);
    const Decoded out = gpu->decode(got.bytes, got.bytes_per_group);
    EXPECT_EQ(here.rows_per_group, rows_per_group);
    EXPECT_EQ(bytes_of(out.rows.cpu()), bytes_of(here.rows));
    check_bound(options, rows, here.rows, rows_per_group);
    check_clusters(got, here.rows, rows_per_group, *cpu);
    return got;
  }

  /// |x - x'| in double against each row's bound.
  static void check_bound(const CodecOptions& options, const at::Tensor& rows,
                          const at::Tensor& decoded, const std::vector<int64_t>& rows_per_group) {
    const at::Tensor exact = rows.to(at::kDouble);
    const at::Tensor error = at::linalg_vector_norm(decoded.to(at::kDouble) - exact, 2, {1});
    const at::Tensor reference =
        references(rows, rows_per_group, options.error_reference() == "group");
    EXPECT_TRUE((error <= options.max_error() * reference * (1 + 1e-9)).all().item<bool>());
  }

  /// assignment and centroids say what the parcels say.
  void check_clusters(const Encoded& encoded, const at::Tensor& decoded,
                      const std::vector<int64_t>& rows_per_group, const Codec& cpu) const {
    const auto bytes = bytes_of(encoded.bytes.cpu());
    const at::Tensor assignment = encoded.assignment.cpu(), centroids = encoded.centroids.cpu();
    EXPECT_EQ(centroids.size(0), encoded.stats.clusters);
    std::size_t begin = 0;
    int64_t row = 0, before = 0;
    for (std::size_t g = 0; g < rows_per_group.size(); ++g) {
      const auto size = static_cast<std::size_t>(encoded.bytes_per_group[g]);
      if (size == 0) continue;
      const Directory directory = read_directory(bytes.data() + begin);
      EXPECT_EQ(encoded.centroids_per_group[g], directory.centroids);
      for (int64_t i = 0; i < rows_per_group[g]; ++i, ++row) {
        const int64_t id = directory.id[static_cast<std::size_t>(i)];
        EXPECT_EQ(assignment[row].item<int64_t>(), id == 0 ? -1 : before + id - 1);
      }
      if (directory.centroids > 0) {
        const auto header = read_header(bytes.data() + begin, size, ParcelKind::lsh_expert,
                                        decoded.scalar_type(), decoded.size(1));
        const SharedPart part = dynamic_cast<const LshInternals&>(cpu).shared_part(
            header, {bytes.data() + begin + ParcelHeader::kBytes, header.shared_bytes});
        at::Tensor ordered = at::tensor(part.bases).view({-1, decoded.size(1)}).slice(0, 1);
        if (!part.order.empty()) {
          ordered =
              at::empty_like(ordered).index_copy_(1, at::tensor(part.order).to(at::kLong), ordered);
        }
        const at::Tensor own = centroids.slice(0, before, before + directory.centroids);
        EXPECT_EQ(bytes_of(own), bytes_of(ordered.to(own.scalar_type())));
      }
      before += directory.centroids;
      begin += size;
    }
  }

  /// Every option that planning reads.
  void batch_options() const {
    int64_t with_clusters = 0, without = 0;
    for (const auto dtype : {at::kFloat, at::kBFloat16}) {
      for (const int64_t h : hidden) {
        for (const std::string reference : {"row", "group"}) {
          for (const std::string rounding : {"nearest", "dithered"}) {
            for (const int64_t refine : {0, 1, 2}) {
              if (refine != 1 && (rounding == "dithered" || dtype == at::kFloat)) continue;
              SCOPED_TRACE(reference + " " + rounding + " " + std::to_string(h) + " " +
                           std::to_string(refine) + " " + c10::toString(dtype));
              const auto options = CodecOptions()
                                       .error_reference(reference)
                                       .rounding(rounding)
                                       .refine(refine)
                                       .max_error(0.1);
              const CodecContext context{h, 1, Direction::dispatch, dtype};
              const at::Tensor x = clustered(260, h, 9, 0.1, 1).to(dtype);
              const Encoded some = encode_batch(options, context, x, {}, {200, 0, 60});
              with_clusters += some.stats.clusters;
              const at::Tensor index = at::randint(260, {150}, at::kLong);
              static_cast<void>(encode_batch(options, context, x, index, {149, 1}));
              const at::Tensor plain = gaussian(90, h, 2).to(dtype);
              without +=
                  encode_batch(options, context, plain, {}, {90}).stats.clusters == 0 ? 1 : 0;
              static_cast<void>(
                  encode_batch(CodecOptions(options).max_clusters(0), context, x, {}, {260}));
            }
          }
        }
      }
    }
    EXPECT_GT(with_clusters, 0);
    EXPECT_GT(without, 0);
  }

  /// Sizes around those of warps and chunks, and one of many chunks and blocks.
  void batch_sizes(int64_t most) const {
    for (const int64_t h : hidden) {
      const auto options = CodecOptions();
      for (const int64_t rows : {int64_t{0}, int64_t{1}, int64_t{31}, int64_t{32}, int64_t{33}}) {
        SCOPED_TRACE(std::to_string(rows) + " x " + std::to_string(h));
        const at::Tensor x = clustered(rows, h, 3, 0.05, 3);
        static_cast<void>(
            encode_batch(options, {h, 0, Direction::dispatch, at::kFloat}, x, {}, {rows}));
      }
    }
    for (const auto& [rows, h] : {std::pair<int64_t, int64_t>{130, 384}, {40, 4096}}) {
      for (const auto dtype : {at::kFloat, at::kBFloat16}) {
        SCOPED_TRACE(std::to_string(rows) + " x " + std::to_string(h));
        const at::Tensor x = clustered(rows, h, 3, 0.05, 3).to(dtype);
        static_cast<void>(
            encode_batch(CodecOptions(), {h, 0, Direction::dispatch, dtype}, x, {}, {rows - 7, 7}));
      }
    }
    const int64_t h = hidden.front();
    SCOPED_TRACE(std::to_string(most) + " x " + std::to_string(h));
    const at::Tensor x = clustered(most, h, 40, 0.05, 3).to(at::kBFloat16);
    static_cast<void>(encode_batch(CodecOptions(), {h, 0, Direction::combine, at::kBFloat16}, x, {},
                                   {most / 3, most - most / 3}));
  }

  /// Rows in a learned basis. Its products are cuBLAS's on a GPU: then bytes and rows are the CPU's
  /// but for rounding, for which the bound has room.
  void basis() const {
    for (const auto dtype : {at::kFloat, at::kBFloat16}) {
      for (const int64_t h : hidden) {
        if (h > 512) continue;  // fitting takes the CPU minutes
        const int64_t fit_rows = std::max<int64_t>(700, 4 * h);
        // Off the origin, so that the mean matters.
        const at::Tensor fit = (clustered(fit_rows, h, 20, 0.3, 1) + 1.5).to(dtype);
        for (const std::string reference : {"row", "group"}) {
          for (const std::string rounding : {"nearest", "dithered"}) {
            SCOPED_TRACE(reference + " " + rounding + " " + std::to_string(h) + " " +
                         c10::toString(dtype));
            const auto options = CodecOptions()
                                     .state("learned")
                                     .transform("basis")
                                     .sample_rows(fit_rows)
                                     .codebook_size(rounding == "nearest" ? 40 : 0)
                                     .error_reference(reference)
                                     .rounding(rounding)
                                     .max_error(0.1);
            const CodecContext context{h, 0, Direction::dispatch, dtype};
            const at::Tensor x = (clustered(80, h, 20, 0.3, 1) + 1.5).to(dtype);
            with_basis(options, context, x, {}, {30, 0, 50}, fit);
            with_basis(options, context, x, at::randperm(80, at::kLong).slice(0, 0, 65), {64, 1},
                       fit);
            with_basis(options, context, x.slice(0, 0, 0), {}, {0}, fit);
            at::Tensor odd = make_rows("mixed", 40, h, 2);
            odd.slice(0, 3, 9).zero_();
            // The CPU may find that these explain themselves in less.
            with_basis(options, context, odd.to(dtype), {}, {40}, fit, /*equal=*/false);
          }
        }
      }
    }
    if (!same_bytes) return;
    EXPECT_GT(2 * compared, with_state);  // or the test has lost its point
    damage(CodecOptions().state("learned").transform("basis").sample_rows(700).codebook_size(40),
           {100, 0, Direction::dispatch, at::kFloat}, clustered(9, 100, 20, 0.3, 1),
           clustered(700, 100, 20, 0.3, 1));
  }
  void with_basis(const CodecOptions& options, const CodecContext& context, const at::Tensor& x,
                  const at::Tensor& index, const std::vector<int64_t>& rows_per_group,
                  const at::Tensor& fit, bool equal = true) const {
    if (same_bytes && equal) both_ways(options, context, x, index, rows_per_group, fit);
    CodecContext on_gpu = context;
    on_gpu.device = device;
    const auto cpu = make_codec(options, context), gpu = make(options, on_gpu);
    cpu->observe(fit, {});
    gpu->observe(there(fit), {});
    ASSERT_TRUE(cpu->refresh(*make_self_communicator()));
    ASSERT_TRUE(gpu->refresh(*make_self_communicator()));
    const Encoded want = cpu->encode(x, index, rows_per_group);
    const Encoded got =
        gpu->encode(there(x), index.defined() ? there(index) : index, rows_per_group);
    EXPECT_EQ(got.stats.staged_bytes, 0);
    EXPECT_LE(got.stats.max_error_ratio, 1.0);
    const at::Tensor rows = index.defined() ? x.index_select(0, index) : x;
    for (const Encoded* from : {&want, &got}) {
      for (const auto& codec : {cpu, gpu}) {
        const at::Tensor bytes = codec == cpu ? from->bytes.cpu() : there(from->bytes);
        const at::Tensor out = codec->decode(bytes, from->bytes_per_group).rows.cpu();
        check_bound(options, rows, out, rows_per_group);
      }
    }
  }

  /// Zeros, outliers, tiny, huge, equal rows: nothing breaks the bound.
  void batch_kinds() const {
    const int64_t h = hidden.back();
    for (const std::string& kind : row_kinds()) {
      for (const std::string reference : {"row", "group"}) {
        SCOPED_TRACE(kind + " " + reference);
        const at::Tensor x = make_rows(kind, 120, h, 2);
        static_cast<void>(encode_batch(CodecOptions().error_reference(reference),
                                       {h, 0, Direction::dispatch, at::kFloat}, x, {}, {40, 80}));
      }
    }
    at::Tensor x = gaussian(50, h, 4);
    x[37][3] = std::numeric_limits<float>::quiet_NaN();
    const auto gpu = make(CodecOptions(), {h, 4, Direction::dispatch, at::kFloat, device});
    expect_error("row 37 holds NaN or Inf", [&] { (void)gpu->encode(there(x), {20, 30}); });
  }
};

}  // namespace lshmoe::testing
