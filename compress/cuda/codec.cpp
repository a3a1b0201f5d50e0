#include "lshmoe/compress/cuda/codec.hpp"

#include "lshmoe/compress/cpu_codec.hpp"
#include "lshmoe/compress/cuda/kinds.hpp"

namespace lshmoe::cuda {
namespace {
CodecContext on_cpu(CodecContext context) {
  context.device = at::kCPU;
  return context;
}
at::Tensor host(const at::Tensor& tensor) { return tensor.defined() ? tensor.cpu() : tensor; }
}  // namespace

StagedCodec::StagedCodec(const CodecOptions& options, const CodecContext& context)
    : Codec(options, context), cpu_(lshmoe::make_codec(options, on_cpu(context))) {}

Encoded StagedCodec::encode(const at::Tensor& x, const at::Tensor& row_index,
                            const std::vector<int64_t>& rows_per_group) const {
  check_encode(context(), x, row_index, rows_per_group);
  const at::Tensor rows = x.cpu();
  Encoded encoded = cpu_->encode(rows, host(row_index), rows_per_group);
  encoded.stats.staged_bytes = static_cast<int64_t>(rows.nbytes() + encoded.bytes.nbytes());
  encoded.bytes = encoded.bytes.to(x.device());
  if (encoded.assignment.defined()) encoded.assignment = encoded.assignment.to(x.device());
  if (encoded.centroids.defined()) encoded.centroids = encoded.centroids.to(x.device());
  return encoded;
}

void StagedCodec::decode_into(at::Tensor& out, const at::Tensor& row_index, const at::Tensor& bytes,
                              const std::vector<int64_t>& bytes_per_group,
                              const std::vector<int64_t>& rows_per_group) const {
  check_decode(context(), out, row_index, bytes, bytes_per_group, rows_per_group);
  const at::Tensor index = host(row_index);
  check_index_values(index, out.size(0), "decode");
  const int64_t count = index.numel();
  at::Tensor rows = at::empty({count, out.size(1)}, out.options().device(at::kCPU));
  cpu_->decode_into(rows, at::arange(count, at::kLong), bytes.cpu(), bytes_per_group,
                    rows_per_group);
  out.index_copy_(0, row_index.to(out.device()), rows.to(out.device()));
}

Decoded StagedCodec::decode(const at::Tensor& bytes,
                            const std::vector<int64_t>& bytes_per_group) const {
  check_bytes(context(), bytes, bytes_per_group);
  Decoded decoded = cpu_->decode(bytes.cpu(), bytes_per_group);
  decoded.rows = decoded.rows.to(bytes.device());
  return decoded;
}

void StagedCodec::observe(const at::Tensor& x, const at::Tensor& row_index) {
  if (options().state() == "learned") cpu_->observe(x.cpu(), host(row_index));
}

std::shared_ptr<Codec> make_codec(const CodecOptions& options, const CodecContext& context) {
  return options.kind() == "lsh" ? cuda::make_lsh_codec(options, context)
                                 : make_fixed_codec(options, context);
}

}  // namespace lshmoe::cuda
