#pragma once
// Putting parcels together, and their checksums.

#include "lshmoe/kernels/cuda/block.cuh"
#include "lshmoe/kernels/cuda/parcel.hpp"
#include "lshmoe/kernels/cuda/row_coder.cuh"

namespace lshmoe::kernels::cuda {

template <int kThreads>
__global__ void check_index_kernel(std::int64_t* bad, const std::int64_t* index, std::int64_t rows,
                                   std::int64_t tokens) {
  const std::int64_t stride = std::int64_t{gridDim.x} * kThreads;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < rows; i += stride) {
    if (index[i] < 0 || index[i] >= tokens) {
      atomicMin(reinterpret_cast<long long*>(bad), static_cast<long long>(i));
    }
  }
}

/// Of all threads of a block; every thread gets it.
template <int kThreads, class V, class Better>
__device__ V block_best(V value, Better better) {
  __shared__ V slot[kThreads];
  __syncthreads();
  slot[threadIdx.x] = value;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < static_cast<unsigned>(half) &&
        better(slot[threadIdx.x + half], slot[threadIdx.x])) {
      slot[threadIdx.x] = slot[threadIdx.x + half];
    }
  }
  __syncthreads();
  return slot[0];
}

/// A block a group; sums in the lanes of 128 threads.
template <int kThreads>
__global__ void row_totals_kernel(RowTotals* totals, std::int64_t* offset, const CodedGroup* groups,
                                  std::int64_t group_count, const CodedGroup* coded,
                                  std::int64_t coded_count, const std::int64_t* number,
                                  std::int64_t numbers, const std::int64_t* payload_bytes,
                                  const std::uint8_t* whole, const double* squared,
                                  const double* bound, const double* error) {
  for (std::int64_t g = blockIdx.x; g < group_count; g += gridDim.x) {
    const std::int64_t first = groups[g].first, rows = groups[g].rows;
    std::int64_t bytes = 0, bad = first + rows, whole_rows = 0;
    double relative_sum = 0, relative_max = 0, ratio_max = 0;
    for (std::int64_t from = first; from < first + rows; from += kThreads) {
      const std::int64_t i = from + threadIdx.x;
      std::int32_t mine = 0, total = 0;
      if (i < first + rows) {
        std::int64_t row = number != nullptr ? number[i] : i;
        row = row < 0 ? 0 : row < numbers ? row : numbers - 1;
        mine = payload_bytes != nullptr ? static_cast<std::int32_t>(payload_bytes[row]) : 0;
        whole_rows += whole != nullptr ? whole[row] : 0;
        const double energy = squared != nullptr ? squared[row] : 0;
        if (!(energy <= 1.7976931348623157e308) && i < bad) bad = i;
        if (error != nullptr) {
          const double relative = energy > 0 ? error[row] / std::sqrt(energy) : 0;
          relative_sum += relative;
          relative_max = relative > relative_max ? relative : relative_max;
          const double ratio = bound != nullptr && bound[row] > 0 ? error[row] / bound[row] : 0;
          ratio_max = ratio > ratio_max ? ratio : ratio_max;
        }
      }
      // 128 rows of 2^24 elements of 4 bytes would be too many: hidden is kMaxCodedHidden at most.
      const std::int64_t before = exclusive_sum<kThreads>(mine, &total);
      if (i < first + rows && offset != nullptr) offset[i] = bytes + before;
      bytes += total;
    }
    const auto larger = [](double a, double b) { return a > b; };
    relative_sum = fold_lanes<kThreads>(relative_sum);
    const double whole_sum = fold_lanes<kThreads>(static_cast<double>(whole_rows));
    relative_max = block_best<kThreads>(relative_max, larger);
    ratio_max = block_best<kThreads>(ratio_max, larger);
    bad = block_best<kThreads>(bad, [](std::int64_t a, std::int64_t b) { return a < b; });
    if (threadIdx.x == 0) {
      RowTotals& out = totals[g];
      out.payload_bytes = bytes;
      out.whole_rows = static_cast<std::int64_t>(whole_sum);
      out.relative_sum = relative_sum;
      out.relative_max = relative_max;
      out.ratio_max = ratio_max;
      const CodedGroup& as_coded = coded[coded_count == 1 ? 0 : g];
      out.step = as_coded.step;
      out.id_bytes = as_coded.id_bytes;
      out.bad_row = bad < first + rows ? bad : -1;
    }
  }
}

/// A block a row; then the heads, a block each.
template <class T, int kThreads>
__global__ void assemble_kernel(std::uint8_t* out, const ParcelPlace* places, std::int64_t count,
                                const std::uint8_t* heads, CodedRows coded, RowsOf<T> rows,
                                const std::int64_t* number, const std::int64_t* offset) {
  const auto whole_bytes = rows.hidden * static_cast<std::int64_t>(sizeof(T));
  for (std::int64_t unit = blockIdx.x; unit < rows.rows + count; unit += gridDim.x) {
    if (unit >= rows.rows) {
      const ParcelPlace place = places[unit - rows.rows];
      copy_bytes(out + place.begin, heads + place.head_begin, place.head_copied);
      continue;
    }
    const std::int64_t i = unit;
    const ParcelPlace place = places[group_of(places, count, i)];
    std::uint8_t* directory = out + place.begin + place.head_bytes;
    const auto* natural = reinterpret_cast<const std::uint8_t*>(row_at(rows, i));
    if (place.record_bytes == 0) {
      copy_bytes(directory + (i - place.first) * whole_bytes, natural, whole_bytes);
      continue;
    }
    const std::int64_t row = number != nullptr ? number[i] : i;
    copy_bytes(directory + (i - place.first) * place.record_bytes,
               coded.records + row * coded.record_stride, place.record_bytes);
    copy_bytes(directory + place.rows * place.record_bytes + offset[i],
               coded.whole[row] != 0 ? natural : coded.payloads + row * coded.payload_stride,
               coded.payload_bytes[row]);
  }
}

/// Four threads a block of kChecksumBlock bytes.
template <int kThreads>
__global__ void checksum_blocks_kernel(const ChecksumSpan* spans, std::int64_t count,
                                       std::int64_t blocks) {
  constexpr std::int64_t kBlockBytes = kChecksumBlock;
  const std::int64_t stride = std::int64_t{gridDim.x} * (kThreads / 4);
  // All threads of a warp go round equally often.
  for (std::int64_t from = std::int64_t{blockIdx.x} * (kThreads / 4); from < blocks;
       from += stride) {
    std::int64_t block = from + threadIdx.x / 4;
    const bool mine = block < blocks;
    if (!mine) block = blocks - 1;
    const ChecksumSpan span = spans[group_of(spans, count, block)];
    const std::int64_t at = (block - span.first) * kBlockBytes;
    const std::int64_t size = span.size - at < kBlockBytes ? span.size - at : kBlockBytes;
    const std::uint8_t *data = span.data + at, *end = span.data + span.size;
    const std::uint32_t sum = checksum_by_four(
        [data, end](std::uint64_t w) { return load_before(data + 8 * w, end); },
        static_cast<std::uint64_t>(size), span.size <= kBlockBytes ? span.seed : 0);
    if (mine && threadIdx.x % 4 == 0) {
      std::uint8_t* to = span.out + 4 * (block - span.first);
      for (int i = 0; i < 4; ++i) to[i] = static_cast<std::uint8_t>(sum >> (8 * i));
    }
  }
}

template <class T>
__global__ void scatter_raw_kernel(T* out, const std::int64_t* index, std::int64_t out_rows,
                                   const RawPlace* places, std::int64_t count, std::int64_t rows,
                                   std::int64_t hidden) {
  const auto row_bytes = hidden * static_cast<std::int64_t>(sizeof(T));
  for (std::int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    const RawPlace place = places[group_of(places, count, i)];
    const std::int64_t to = index != nullptr ? index[i] : i;
    if (to < 0 || to >= out_rows) continue;
    const std::uint8_t* from = place.body + (i - place.first) * row_bytes;
    auto* row = reinterpret_cast<std::uint8_t*>(out + to * hidden);
    const std::uint8_t* end = place.body + place.rows * row_bytes;
    const bool aligned = (reinterpret_cast<std::uintptr_t>(row) | row_bytes) % 8 == 0;
    if (aligned) {
      for (std::int64_t j = threadIdx.x; j < row_bytes / 8; j += blockDim.x) {
        reinterpret_cast<std::uint64_t*>(row)[j] = load_before(from + 8 * j, end);
      }
    } else {
      for (std::int64_t j = threadIdx.x; j < row_bytes; j += blockDim.x) row[j] = from[j];
    }
  }
}

}  // namespace lshmoe::kernels::cuda
