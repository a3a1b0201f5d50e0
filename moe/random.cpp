#include "lshmoe/moe/random.hpp"

#include <ATen/CPUGeneratorImpl.h>

#include <cmath>

namespace lshmoe {

at::Generator make_stream(std::initializer_list<uint64_t> name) {
  // splitmix64 (Steele, Lea, Flood 2014), chained: streams of neighboring names are unrelated.
  uint64_t state = 0x6c73686d6f65;
  for (const uint64_t part : name) {
    state += part + 0x9e3779b97f4a7c15;
    state = (state ^ (state >> 30)) * 0xbf58476d1ce4e5b9;
    state = (state ^ (state >> 27)) * 0x94d049bb133111eb;
    state ^= state >> 31;
  }
  return at::make_generator<at::CPUGeneratorImpl>(state);
}

at::Tensor uniform_fan_in(at::IntArrayRef sizes, int64_t fan_in, at::Generator& stream) {
  const double bound = 1.0 / std::sqrt(static_cast<double>(fan_in));
  return at::empty(sizes, at::kFloat).uniform_(-bound, bound, stream);
}

}  // namespace lshmoe
