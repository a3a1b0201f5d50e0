#pragma once
// Codecs: what is sent between ranks, in both directions, forward and backward.
//
// encode and decode are local; only refresh (learned state) communicates.

#include <torch/torch.h>

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "lshmoe/comm/communicator.hpp"
#include "lshmoe/compress/parcel.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe {

/// Which of the four exchanges of a layer a codec serves.
enum class Direction : std::uint8_t { dispatch, combine, combine_backward, dispatch_backward };
/// Name as written above.
[[nodiscard]] std::string_view name_of(Direction direction);

/// What to send instead of the rows themselves. TORCH_ARG style: CodecOptions().kind("lsh").
struct CodecOptions {
  /// none | bf16 | fp8 | int8 | int4 | lsh. fp8: e4m3, an fp32 scale per 128 elements. int8: an
  /// fp32 scale a row. int4: blocks of 128 elements rotated by a Hadamard matrix, a bfloat16 scale
  /// each.
  TORCH_ARG(std::string, kind) = "lsh";
  /// lsh only. expert: every token is rebuilt before its expert runs. source: the paper's way, only
  /// centroids travel and the residual is added where the token came from.
  TORCH_ARG(std::string, restore) = "expert";
  /// lsh, restore=expert: a hard bound on the L2 error of every row, relative to error_reference;
  /// 0 = rows travel whole, bit-exact. Finite, >= 0.
  TORCH_ARG(double, max_error) = 0.1;
  /// row: |x - x'| <= max_error * min(|x|, 3 M). group: |x - x'| <= max_error * rms of min(|x|, 3
  /// M) over the group's rows that are not zero. M is the median norm, to an eighth of an octave
  /// below it, of all rows of the encode call that are not zero: outliers neither carry the error
  /// of many rows nor set the bound of others, and a row's own bound (row) does not depend on its
  /// group. With overlap_degree > 1 each chunk of tokens is a call. Only the sender needs M.
  /// Empty: row for dispatch, group for the other directions: a row of little weight, or of a small
  /// gradient, needs no finer step than the others.
  TORCH_ARG(std::string, error_reference) = "";
  /// Cross-polytope hashes a token, and the dimension m of each (2m buckets a hash).
  TORCH_ARG(int64_t, hashes) = 3;
  TORCH_ARG(int64_t, hash_dim) = 8;
  /// Columns of the projection R; hashes * hash_dim at least. The hashes read the first ones, the
  /// nearest-centroid search reads all.
  TORCH_ARG(int64_t, projection) = 64;
  /// Passes that move a row to its nearest centroid after the LSH seeding; 0 = buckets as they are.
  TORCH_ARG(int64_t, refine) = 1;
  /// Largest number of clusters a group may keep; 0 = no clusters. Kept only where they save bytes.
  TORCH_ARG(int64_t, max_clusters) = 128;
  /// lsh, restore=expert. batch: a parcel explains itself. learned: both ends know a codebook and a
  /// channel order (or basis), fitted now and then to what was sent; before the first refresh, and
  /// wherever it is cheaper, a parcel explains itself.
  TORCH_ARG(std::string, state) = "batch";
  /// learned: centroids of the codebook at most.
  TORCH_ARG(int64_t, codebook_size) = 1024;
  /// What residuals are coded in. channels: ordered by energy. basis (learned only): turned into
  /// the directions of their second moment; 2 hidden^2 operations a row at each end.
  TORCH_ARG(std::string, transform) = "channels";
  /// A basis above hidden_size 2048, too: there its operations and its bytes cost more than it
  /// saves on most links, and make_codec refuses it.
  TORCH_ARG(bool, force_basis) = false;
  /// learned: refresh() fits at its calls 1, 2, 4, ... below refresh_every, then at each multiple.
  TORCH_ARG(int64_t, refresh_every) = 100;
  /// learned: rows that a fit sees, over the whole group. 0: 2,048, with a basis 10 x hidden_size
  /// at least; but no more than a 32nd of the rows that will be sent until the next fit.
  TORCH_ARG(int64_t, sample_rows) = 0;
  /// restore=source: y = E(c) + alpha (x - c'). 1 is the paper.
  TORCH_ARG(double, alpha) = 0.0;
  /// restore=source: alpha is estimated in each forward, for each expert that this rank sends to,
  /// by least squares over probes: tokens that travel alone, beside the centroid c' of their
  /// cluster. alpha = sum of <E(x) - E(c'), x - c'> / sum of |x - c'|^2, a constant in the
  /// backward. Where there are no probes, the number above.
  TORCH_ARG(bool, estimate_alpha) = false;
  /// Probes of a group at most; never more than a quarter of the rows that its clusters save.
  TORCH_ARG(int64_t, alpha_probes) = 4;
  /// Empty: dithered for lsh, restore=expert, in both backward directions, else nearest.
  /// nearest; or one that keeps the mean of many rows (but for the cast to the row's dtype):
  /// stochastic (fp8, int8, int4), up or down by chance; dithered (lsh, restore=expert), with an
  /// offset that both ends know, at about the error of nearest. The noise is a function of the
  /// seed, the layer, the direction and the row.
  TORCH_ARG(std::string, rounding) = "";
  /// Of projection and noise; independent of the seeds of parameters and data.
  TORCH_ARG(uint64_t, seed) = 0;
};

/// Layers that were given no number draw one from here on (moe/layer_number.hpp).
inline constexpr int64_t kDrawnLayers = int64_t{1} << 31;
/// "layer 3", or "layer 3 of those without a number"; for error texts.
[[nodiscard]] std::string name_of_layer(int64_t layer);

/// Where a codec stands: rows of `hidden_size` elements of `dtype` in layer number `layer`, in the
/// memory of `device` (the CPU, or a GPU; a GPU without index: the tensors' own).
struct CodecContext {
  int64_t hidden_size = 0;
  int64_t layer = 0;
  Direction direction = Direction::dispatch;
  at::ScalarType dtype = at::kFloat;
  at::Device device = at::kCPU;
};

struct CodecStats {
  int64_t rows = 0;
  int64_t clusters = 0;    ///< centroids sent (probes too), summed over the groups
  int64_t raw_bytes = 0;   ///< 2 * rows * hidden_size: what bf16 would take, whatever the dtype
  int64_t sent_bytes = 0;  ///< all bytes of all parcels
  int64_t whole_rows = 0;  ///< rows sent whole
  double max_relative_error = 0.0;   ///< largest |x - x'| / |x| over the rows
  double mean_relative_error = 0.0;  ///< mean of the same
  /// Largest error over its own bound (CodecOptions::error_reference), <= 1; 0 without a bound.
  double max_error_ratio = 0.0;
  /// Bytes copied between the GPU and host memory because this setting is coded by the CPU; 0 on
  /// the CPU, and where the GPU's own kernels code.
  int64_t staged_bytes = 0;
};

/// The learned state of one codec; zeros without one.
struct StateStats {
  int64_t version = 0;       ///< counts the fits; 0: none yet
  int64_t centroids = 0;     ///< of the codebook
  int64_t state_bytes = 0;   ///< of the state as it travels
  int64_t memory_bytes = 0;  ///< held by this process: two versions and the sample
  int64_t bytes_sent = 0;    ///< by this process in all refreshes: samples and states
  double seconds = 0.0;      ///< spent in refresh(), waiting included
  /// Of all that coding reads of the state: equal on all ranks of the group.
  std::uint32_t checksum = 0;
};

/// estimate_alpha: a row that is a centroid by itself, and the centroid of the cluster it left.
struct Probe {
  int64_t row = 0;      ///< of `assignment`
  int64_t cluster = 0;  ///< index into `centroids`
};

struct Encoded {
  at::Tensor bytes;  ///< uint8 [sum], on the codec's device, one parcel a group, one after another
  std::vector<int64_t> bytes_per_group;  ///< [groups]; 0 for a group without rows
  at::Tensor
      assignment;  ///< int64 [N]: row -> centroid (over all groups), -1 none. lsh; else undefined
  at::Tensor centroids;  ///< [C, hidden], row dtype, as decoded. lsh; else undefined
  std::vector<int64_t> centroids_per_group;  ///< [groups]
  std::vector<Probe> probes;                 ///< in row order
  CodecStats stats;
};

struct Decoded {
  at::Tensor rows;                      ///< [N, hidden], the codec's dtype
  std::vector<int64_t> rows_per_group;  ///< [groups]
};

/// A row to encode holds NaN or infinity; the text names it.
class NonFiniteRow : public InvalidArgument {
 public:
  NonFiniteRow(const class Codec& codec, int64_t row_of_x);
  const int64_t row;  ///< of the encoded tensor
};

/// Thread-safe. encode and decode keep nothing between calls; observe and refresh change what they
/// use (state=learned), and wait until those that run are done.
///
/// Tensors are on the context's device; row_index may also be on the CPU. On a GPU, work is queued
/// on the current stream; encode waits for it once, for the sizes, and decode once, for the checks.
/// The parcels are the same: those of a GPU can be decoded on the CPU and the other way round.
class Codec {
 public:
  Codec(const Codec&) = delete;
  Codec& operator=(const Codec&) = delete;
  virtual ~Codec() = default;

  [[nodiscard]] const CodecOptions& options() const { return options_; }
  [[nodiscard]] const CodecContext& context() const { return context_; }

  /// Encodes N rows of x, group after group. Local.
  /// x [tokens, hidden_size] float32 | bfloat16 (none: float64 too), contiguous rows; row_index
  /// int64 [N] picks the rows, ordered by group (undefined: all, in their order);
  /// sum(rows_per_group) == N. N may be 0.
  /// Equal input gives equal bytes, on every run and for every number of threads.
  /// Throws NonFiniteRow when a row holds NaN or Inf (kinds none and bf16 let them pass),
  /// InvalidArgument when shapes or dtypes do not fit.
  [[nodiscard]] virtual Encoded encode(const at::Tensor& x, const at::Tensor& row_index,
                                       const std::vector<int64_t>& rows_per_group) const = 0;
  /// The same for all rows of `rows` in their order.
  [[nodiscard]] Encoded encode(const at::Tensor& rows,
                               const std::vector<int64_t>& rows_per_group) const {
    return encode(rows, at::Tensor(), rows_per_group);
  }

  /// Decodes parcels into rows of `out`: row i of the stream goes to out[row_index[i]]. Local.
  /// out [any, hidden_size], the codec's dtype, contiguous. Rows not named are left alone.
  /// The bytes come from a wire: counts, widths, ids, lengths and checksums are checked; anything
  /// wrong throws InvalidArgument; what was written to the named rows by then is unspecified. The
  /// number of rows must be row_index.size(0), and the rows of each group rows_per_group.
  virtual void decode_into(at::Tensor& out, const at::Tensor& row_index, const at::Tensor& bytes,
                           const std::vector<int64_t>& bytes_per_group,
                           const std::vector<int64_t>& rows_per_group) const = 0;
  /// Decodes into a new tensor, trusting the parcels' own (checked) row counts.
  [[nodiscard]] virtual Decoded decode(const at::Tensor& bytes,
                                       const std::vector<int64_t>& bytes_per_group) const = 0;

  /// state=learned: offers rows, as encode takes them, as a sample for the next fit. Call it once
  /// for each encode of a training forward or backward; free where no fit is due. Else a no-op.
  /// Local. Rows of a GPU are copied to the host.
  virtual void observe(const at::Tensor& x, const at::Tensor& row_index);

  /// state=learned: where a fit is due, fits the state to the rows observed by all ranks of `comm`
  /// since the last one; every rank gets the same bits. The former version stays known to decode.
  /// Call it once an optimizer step, between a backward and the next forward, on all ranks of the
  /// group alike. Collective over `comm`. Returns whether the version changed. Else a no-op.
  virtual bool refresh(Communicator& comm);
  [[nodiscard]] virtual StateStats state_stats() const;

 protected:
  Codec(CodecOptions options, CodecContext context);

 private:
  CodecOptions options_;
  CodecContext context_;
};

/// True for kind lsh with restore=source: centroids travel in place of rows. Not with max_error 0,
/// which sends every row whole, whatever restore says.
[[nodiscard]] bool sends_centroids(const CodecOptions& options);

/// The options with what their empty names stand for in that direction.
[[nodiscard]] CodecOptions resolved(CodecOptions options, Direction direction);

/// Checks names and ranges; throws InvalidArgument.
void validate(const CodecOptions& options);

/// Makes the codec of one direction of one layer. Local; deterministic in (options, context).
/// Throws InvalidArgument for bad options or a context that does not fit.
[[nodiscard]] std::shared_ptr<Codec> make_codec(const CodecOptions& options,
                                                const CodecContext& context);

}  // namespace lshmoe
