#pragma once
// Rows of a learned state's basis, around its products: residuals before, bases after. Launchers
// (stream.hpp). The arithmetic of compress/state_coder.cpp.

#include <cstdint>

#include "lshmoe/kernels/cuda/row_coder.hpp"

namespace lshmoe::kernels::cuda {

/// out [count, hidden]: the rows first, first + stride, ... less their bases [1 + centroids,
/// hidden]. id [rows] where the row's group has id_bytes (groups null: all have), else base 0;
/// null: base 0.
template <class T>
void basis_residuals(float* out, const RowsOf<T>& rows, std::int64_t first, std::int64_t count,
                     std::int64_t stride, const CodedGroup* groups, std::int64_t group_count,
                     const float* bases, const std::int32_t* id, Stream stream);

/// What of the rows' bounds is left for their coefficients; not below 0. squared: |x|^2. The
/// products at both ends round, and so does the cast to bfloat16; |residual| <= stretch
/// |coefficients|.
void coefficient_bounds(double* coded, const double* bound, const double* squared, double stretch,
                        bool to_bfloat16, std::int64_t rows, std::int64_t hidden, Stream stream);
/// error [rows]: from that of the coefficients to the most that the row's own can be.
void coefficient_errors(double* error, const double* bound, const double* squared,
                        const std::uint8_t* whole, double stretch, bool to_bfloat16,
                        std::int64_t rows, std::int64_t hidden, Stream stream);

/// out[index[i]] = base + residual [rows, hidden], for rows with a base_id (decode_coefficients).
template <class T>
void add_bases(T* out, const std::int64_t* index, const float* residual,
               const std::int32_t* base_id, const CodedGroup* groups, std::int64_t group_count,
               std::int64_t rows, std::int64_t hidden, Stream stream);

}  // namespace lshmoe::kernels::cuda
