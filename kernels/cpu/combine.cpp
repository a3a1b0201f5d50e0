#include "lshmoe/kernels/combine.hpp"

#include <algorithm>
#include <cstring>

#include "lshmoe/kernels/bfloat16.hpp"

namespace lshmoe::kernels {
namespace {

float widen(float value) { return value; }
double widen(double value) { return value; }
float widen(Bfloat16 value) { return to_float(value); }
template <class T, class A>
T narrow(A value) {
  if constexpr (std::is_same_v<T, Bfloat16>) {
    return to_bfloat16(value);
  } else {
    return value;
  }
}

// Columns summed at a time: the sums stay in registers or the first cache.
constexpr std::int64_t kBlock = 256;

template <class T, class A>
void sum(T* out, const T* in, std::int64_t hidden, const std::int64_t* offset,
         std::int64_t segments, const std::int64_t* index, const A* weight) {
  A total[kBlock];
  for (std::int64_t s = 0; s < segments; ++s) {
    T* to = out + s * hidden;
    const std::int64_t first = offset[s], last = offset[s + 1];
    if (last - first == 1 && weight == nullptr) {
      const std::int64_t row = index ? index[first] : first;
      std::memcpy(to, in + row * hidden, static_cast<std::size_t>(hidden) * sizeof(T));
      continue;
    }
    for (std::int64_t c = 0; c < hidden; c += kBlock) {
      const std::int64_t width = std::min(kBlock, hidden - c);
      std::fill_n(total, width, A(0));
      for (std::int64_t j = first; j < last; ++j) {
        const std::int64_t row = index ? index[j] : j;
        const T* from = in + row * hidden + c;
        const A w = weight ? weight[row] : A(1);
        for (std::int64_t i = 0; i < width; ++i) total[i] += w * widen(from[i]);
      }
      for (std::int64_t i = 0; i < width; ++i) to[c + i] = narrow<T, A>(total[i]);
    }
  }
}

template <class T, class A>
A dot(const T* a, const T* b, std::int64_t hidden) {
  // Lanes in place of one running sum: vectorizes without reordering at the compiler's will.
  constexpr std::int64_t kLanes = 32;
  A lane[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= hidden; i += kLanes)
    for (std::int64_t l = 0; l < kLanes; ++l) lane[l] += widen(a[i + l]) * widen(b[i + l]);
  for (; i < hidden; ++i) lane[i % kLanes] += widen(a[i]) * widen(b[i]);
  A total = 0;
  for (const A value : lane) total += value;
  return total;
}

template <class T, class A>
void sum_backward(T* grad_in, A* grad_weight, const T* grad_out, const T* in, std::int64_t hidden,
                  const std::int64_t* offset, std::int64_t segments, const std::int64_t* index,
                  const A* weight) {
  for (std::int64_t s = 0; s < segments; ++s) {
    const T* grad = grad_out + s * hidden;
    for (std::int64_t j = offset[s]; j < offset[s + 1]; ++j) {
      const std::int64_t row = index ? index[j] : j;
      if (grad_weight) grad_weight[row] = dot<T, A>(grad, in + row * hidden, hidden);
      if (!grad_in) continue;
      T* to = grad_in + row * hidden;
      const A w = weight ? weight[row] : A(1);
      for (std::int64_t i = 0; i < hidden; ++i) to[i] = narrow<T, A>(w * widen(grad[i]));
    }
  }
}

/// Calls f with pointers of the element type and the type sums are made in.
template <class F>
void with_types(RowType type, F f) {
  switch (type) {
    case RowType::f32:
      return f(float{}, float{});
    case RowType::bf16:
      return f(Bfloat16{}, float{});
    case RowType::f64:
      return f(double{}, double{});
  }
}

}  // namespace

void segment_sum(RowType type, void* out, const void* in, std::int64_t hidden,
                 const std::int64_t* offset, std::int64_t segments, const std::int64_t* index,
                 const void* weight) {
  with_types(type, [&](auto row, auto accumulate) {
    using T = decltype(row);
    using A = decltype(accumulate);
    sum(static_cast<T*>(out), static_cast<const T*>(in), hidden, offset, segments, index,
        static_cast<const A*>(weight));
  });
}

void segment_sum_backward(RowType type, void* grad_in, void* grad_weight, const void* grad_out,
                          const void* in, std::int64_t hidden, const std::int64_t* offset,
                          std::int64_t segments, const std::int64_t* index, const void* weight) {
  with_types(type, [&](auto row, auto accumulate) {
    using T = decltype(row);
    using A = decltype(accumulate);
    sum_backward(static_cast<T*>(grad_in), static_cast<A*>(grad_weight),
                 static_cast<const T*>(grad_out), static_cast<const T*>(in), hidden, offset,
                 segments, index, static_cast<const A*>(weight));
  });
}

}  // namespace lshmoe::kernels
