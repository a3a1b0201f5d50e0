// The CUDA kernels on the CPU (support/cuda_on_host.hpp) against the CPU's own loops.

#include "tests/support/cuda_on_host.hpp"
// clang-format off: after the above.
#include "kernels/cuda/basis.cu"
#include "kernels/cuda/combine.cu"
#include "kernels/cuda/formats.cu"
#include "kernels/cuda/lsh.cu"
#include "kernels/cuda/parcel.cu"
#include "kernels/cuda/plan.cu"
#include "kernels/cuda/row_coder.cu"
#include "kernels/cuda/rows.cu"
// clang-format on

namespace lshmoe::kernels {
namespace {

template <class T>
using Vector = std::vector<T>;
const char* why_not() { return nullptr; }
constexpr std::int64_t kRows[] = {0, 1, 31, 32, 33, 200};

}  // namespace
}  // namespace lshmoe::kernels

#include "tests/kernels/cuda_kernels_checks.hpp"
