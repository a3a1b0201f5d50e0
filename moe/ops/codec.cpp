// encode and decode: a codec from plain arguments, for Python and for tools.

#include "lshmoe/moe/ops/registration.hpp"

#include "lshmoe/compress/codec.hpp"

namespace lshmoe::ops {
namespace {

std::shared_ptr<Codec> codec_of(int64_t hidden_size, at::ScalarType dtype, at::Device device,
                                c10::string_view kind, double max_error, c10::string_view restore,
                                c10::string_view error_reference, int64_t seed) {
  return make_codec(CodecOptions()
                        .kind(std::string(kind))
                        .max_error(max_error)
                        .restore(std::string(restore))
                        .error_reference(std::string(error_reference))
                        .seed(static_cast<uint64_t>(seed)),
                    CodecContext{hidden_size, 0, Direction::dispatch, dtype, device});
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> encode(
    const at::Tensor& rows, at::IntArrayRef rows_per_group, c10::string_view kind, double max_error,
    c10::string_view restore, c10::string_view error_reference, int64_t seed) {
  TORCH_CHECK(rows.dim() == 2, "rows must be [rows, hidden_size], not ", rows.sizes());
  const Encoded e = codec_of(rows.size(1), rows.scalar_type(), rows.device(), kind, max_error,
                             restore, error_reference, seed)
                        ->encode(rows, rows_per_group.vec());
  return {e.bytes, at::tensor(e.bytes_per_group, at::kLong),
          e.assignment.defined() ? e.assignment : at::empty({0}, at::kLong),
          e.centroids.defined() ? e.centroids : at::empty({0, rows.size(1)}, rows.options())};
}

std::tuple<at::Tensor, at::Tensor> decode(const at::Tensor& bytes, at::IntArrayRef bytes_per_group,
                                          int64_t hidden_size, at::ScalarType dtype,
                                          c10::string_view kind, double max_error,
                                          c10::string_view restore,
                                          c10::string_view error_reference, int64_t seed) {
  const Decoded d =
      codec_of(hidden_size, dtype, bytes.device(), kind, max_error, restore, error_reference, seed)
          ->decode(bytes, bytes_per_group.vec());
  return {d.rows, at::tensor(d.rows_per_group, at::kLong)};
}

}  // namespace

void register_codec(torch::Library& m) {
  m.impl("encode", TORCH_FN(encode));
  m.impl("decode", TORCH_FN(decode));
}

}  // namespace lshmoe::ops
