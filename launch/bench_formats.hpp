#pragma once
// What the codecs are compared with: formats and methods that the library itself does not have.
// Round trips only, by tensor operations; the bytes are counted, not written.

#include <torch/torch.h>

#include <cstdint>
#include <string>
#include <vector>

namespace lshmoe::launch {

struct RoundTrip {
  at::Tensor rows;            ///< what stands for the rows at the receiver, their dtype
  std::int64_t bytes = 0;     ///< that would travel, without headers
  std::int64_t clusters = 0;  ///< centroids among them
};

/// mxfp4: e2m1 (OCP MX), a power of two per 32 elements.  nvfp4: e2m1, an e4m3 scale per 16 and an
/// fp32 one a group.  rcmoe8, rcmoe4: integers rounded by chance, an fp32 scale a row (RCMoE, AAAI
/// 2026).  drop: a share `rate` of the rows, picked by chance, travels whole; the rest is lost.
/// kmeans: the means of rate * rows clusters travel (seeded by rows, ten of Lloyd's iterations),
/// each row is taken for its mean.
[[nodiscard]] const std::vector<std::string>& bench_format_names();
[[nodiscard]] bool has_rate(const std::string& kind);

/// One group, x [rows, hidden] float32 or bfloat16. Deterministic.
[[nodiscard]] RoundTrip round_trip(const std::string& kind, const at::Tensor& x, double rate);

}  // namespace lshmoe::launch
