#include "lshmoe/kernels/bands.hpp"

#include <algorithm>
#include <cstdlib>

namespace lshmoe::kernels {

std::int64_t choose_alphabets(std::uint8_t* index, const std::int32_t* q, std::int64_t count) {
  std::int64_t bits = 0;
  for (std::int64_t first = 0; first < count; first += kBandValues) {
    const int values = static_cast<int>(std::min<std::int64_t>(kBandValues, count - first));
    std::int32_t max_abs = 0;
    if (values == kBandValues) {
      for (int i = 0; i < kBandValues; ++i) max_abs = std::max(max_abs, std::abs(q[first + i]));
    } else {
      for (int i = 0; i < values; ++i) max_abs = std::max(max_abs, std::abs(q[first + i]));
    }
    const int chosen = alphabet_for(max_abs);
    index[first / kBandValues] = static_cast<std::uint8_t>(chosen);
    bits += band_bits(chosen, values);
  }
  return bits;
}

void pack_bands(std::uint8_t* stream, const std::int32_t* q, std::int64_t count,
                const std::uint8_t* index) {
  std::int64_t position = 0;
  for (std::int64_t first = 0; first < count; first += kUnitValues) {
    const int chosen = index[first / kBandValues];
    if (chosen == 0) continue;
    const Alphabet& alphabet = kAlphabetTable.alphabet[chosen];
    const int values = static_cast<int>(std::min<std::int64_t>(kUnitValues, count - first));
    std::uint32_t digit[kUnitValues] = {};
    for (int i = 0; i < values; ++i) {
      digit[i] = static_cast<std::uint32_t>(q[first + i] + alphabet.half);
    }
    if (chosen < kFirstWideAlphabet) {
      put_bits(stream, position, join_digits(alphabet, digit));
      position += alphabet.bits[values];
    } else {
      for (int i = 0; i < values; ++i) {
        put_bits(stream, position, digit[i]);
        position += alphabet.bits[1];
      }
    }
  }
}

std::int64_t payload_bits(const std::uint8_t* index, std::int64_t count) {
  std::int64_t bits = 0;
  const std::int64_t full = count / kBandValues;
  for (std::int64_t band = 0; band < full; ++band) bits += band_bits(index[band], kBandValues);
  if (count % kBandValues != 0) {
    bits += band_bits(index[full], static_cast<int>(count % kBandValues));
  }
  return bits;
}

bool unpack_bands(std::int32_t* q, const std::uint8_t* stream, std::int64_t count,
                  const std::uint8_t* index) {
  std::int64_t position = 0;
  bool valid = true;
  for (std::int64_t first = 0; first < count; first += kUnitValues) {
    const int chosen = index[first / kBandValues];
    const Alphabet& alphabet = kAlphabetTable.alphabet[chosen];
    const int values = static_cast<int>(std::min<std::int64_t>(kUnitValues, count - first));
    std::uint32_t digit[kUnitValues] = {};
    if (chosen == 0) {
      // all zero, no bits
    } else if (chosen < kFirstWideAlphabet) {
      const std::uint64_t number = get_bits(stream, position, alphabet.bits[values]);
      position += alphabet.bits[values];
      valid &= number < alphabet.power[values];
      split_digits(alphabet, number, digit);
    } else {
      for (int i = 0; i < values; ++i) {
        digit[i] = static_cast<std::uint32_t>(get_bits(stream, position, alphabet.bits[1]));
        position += alphabet.bits[1];
        valid &= digit[i] < alphabet.size;
      }
    }
    if (values == kUnitValues) {
      for (int i = 0; i < kUnitValues; ++i) {
        q[first + i] = static_cast<std::int32_t>(digit[i]) - alphabet.half;
      }
    } else {
      for (int i = 0; i < values; ++i) {
        q[first + i] = static_cast<std::int32_t>(digit[i]) - alphabet.half;
      }
    }
  }
  return valid;
}

}  // namespace lshmoe::kernels
