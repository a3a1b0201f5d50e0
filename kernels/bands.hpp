#pragma once
// Bands: 16 quantized values share one alphabet of odd size, chosen out of 16; up to 8 values make
// one number in that base (mixed radix), of a length that the alphabet alone decides.
//
// Element functors; C++17, shared with .cu files. The alphabets are part of the parcel format.

#include <cstdint>
#include <cstring>

#include "lshmoe/kernels/host_device.hpp"

namespace lshmoe::kernels {

inline constexpr int kBandValues = 16;  ///< values under one alphabet
inline constexpr int kUnitValues = 8;   ///< values in one number
inline constexpr int kAlphabets = 16;
/// Alphabets from this one on are powers of two less one and packed value by value.
inline constexpr int kFirstWideAlphabet = 13;
/// Largest |q| that can be packed.
inline constexpr std::int32_t kMaxQuantized = 32767;

/// What packing and unpacking need to know of one alphabet of a values.
struct Alphabet {
  std::uint32_t size;         ///< a, odd: the values -(a-1)/2 .. (a-1)/2
  std::int32_t half;          ///< (a-1)/2
  std::uint8_t bits[9];       ///< bits of n values, n = 0 .. 8
  std::uint64_t power[9];     ///< a^n (not for wide alphabets)
  std::uint64_t reciprocal4;  ///< floor(2^64 / a^4)
  std::uint64_t reciprocal2;  ///< floor(2^42 / a^2) + 1
  std::uint64_t reciprocal1;  ///< floor(2^21 / a) + 1
};

struct AlphabetTable {
  Alphabet alphabet[kAlphabets];
  std::uint8_t index_of[64];  ///< by max |q| < 64: the least alphabet that holds it
};

/// Sizes of the alphabets by index.
inline constexpr std::uint32_t kAlphabetSizes[kAlphabets] = {1,  3,  5,  7,  9,   11,  15,   19,
                                                             23, 31, 47, 63, 127, 511, 4095, 65535};

constexpr AlphabetTable make_alphabet_table() {
  AlphabetTable table{};
  for (int i = 0; i < kAlphabets; ++i) {
    Alphabet& alphabet = table.alphabet[i];
    const std::uint64_t size = kAlphabetSizes[i];
    alphabet.size = static_cast<std::uint32_t>(size);
    alphabet.half = static_cast<std::int32_t>((size - 1) / 2);
    if (i >= kFirstWideAlphabet) {
      int width = 0;
      while ((std::uint64_t{1} << width) < size) ++width;
      for (int n = 0; n <= kUnitValues; ++n)
        alphabet.bits[n] = static_cast<std::uint8_t>(n * width);
      continue;
    }
    std::uint64_t power = 1;
    for (int n = 0; n <= kUnitValues; ++n) {
      alphabet.power[n] = power;
      int bits = 0;
      while ((std::uint64_t{1} << bits) < power) ++bits;
      alphabet.bits[n] = static_cast<std::uint8_t>(bits);
      power *= size;
    }
    if (size > 1) {
      alphabet.reciprocal4 = ~std::uint64_t{0} / alphabet.power[4];
      alphabet.reciprocal2 = (std::uint64_t{1} << 42) / alphabet.power[2] + 1;
      alphabet.reciprocal1 = (std::uint64_t{1} << 21) / alphabet.power[1] + 1;
    }
  }
  for (std::uint32_t m = 0; m < 64; ++m) {
    int i = 0;
    while (kAlphabetSizes[i] < 2 * m + 1) ++i;
    table.index_of[m] = static_cast<std::uint8_t>(i);
  }
  return table;
}

inline constexpr AlphabetTable kAlphabetTable = make_alphabet_table();

#if defined(__CUDACC__)
namespace detail {
static __device__ const AlphabetTable kDeviceAlphabetTable = make_alphabet_table();
}
#endif
/// The table, on the side that runs this.
LSHMOE_HOST_DEVICE inline const AlphabetTable& alphabet_table() {
#if defined(__CUDA_ARCH__)
  return detail::kDeviceAlphabetTable;
#else
  return kAlphabetTable;
#endif
}

/// Index of the least alphabet that holds values up to max_abs (<= kMaxQuantized) in size.
LSHMOE_HOST_DEVICE inline int alphabet_for(std::int32_t max_abs) {
  if (max_abs < 64) return alphabet_table().index_of[max_abs];
  int index = kFirstWideAlphabet;
  while (alphabet_table().alphabet[index].half < max_abs) ++index;
  return index;
}

/// Bits of `count` (<= 16) values of one band: two numbers at most.
LSHMOE_HOST_DEVICE inline int band_bits(int index, int count) {
  const Alphabet& alphabet = alphabet_table().alphabet[index];
  return count <= kUnitValues ? alphabet.bits[count]
                              : alphabet.bits[kUnitValues] + alphabet.bits[count - kUnitValues];
}

/// 8 digits 0 .. a-1 -> one number < a^8, first digit least.
LSHMOE_HOST_DEVICE inline std::uint64_t join_digits(const Alphabet& alphabet,
                                                    const std::uint32_t* digit) {
  const std::uint64_t a = alphabet.power[1], a2 = alphabet.power[2], a4 = alphabet.power[4];
  const std::uint64_t d01 = digit[0] + a * digit[1], d23 = digit[2] + a * digit[3];
  const std::uint64_t d45 = digit[4] + a * digit[5], d67 = digit[6] + a * digit[7];
  return (d01 + a2 * d23) + a4 * (d45 + a2 * d67);
}

/// The inverse of join_digits; number must be < a^8. Divisions by reciprocals, all exact: the
/// bounds are a^4 < 2^28 and, for the 64-bit one, a correction by one.
LSHMOE_HOST_DEVICE inline void split_digits(const Alphabet& alphabet, std::uint64_t number,
                                            std::uint32_t* digit) {
  const std::uint64_t a = alphabet.power[1], a2 = alphabet.power[2], a4 = alphabet.power[4];
#if defined(__CUDA_ARCH__)
  std::uint64_t high = __umul64hi(number, alphabet.reciprocal4);
#else
  auto high = static_cast<std::uint64_t>(
      static_cast<unsigned __int128>(number) * alphabet.reciprocal4 >> 64);
#endif
  std::uint64_t low = number - high * a4;
  const std::uint64_t over = low >= a4 ? 1 : 0;
  high += over;
  low -= over * a4;
  const std::uint64_t quads[2] = {low, high};
  for (int i = 0; i < 2; ++i) {
    const std::uint64_t upper = quads[i] * alphabet.reciprocal2 >> 42;
    const std::uint64_t pairs[2] = {quads[i] - upper * a2, upper};
    for (int j = 0; j < 2; ++j) {
      const std::uint64_t second = pairs[j] * alphabet.reciprocal1 >> 21;
      digit[4 * i + 2 * j] = static_cast<std::uint32_t>(pairs[j] - second * a);
      digit[4 * i + 2 * j + 1] = static_cast<std::uint32_t>(second);
    }
  }
}

/// ORs the low `bits` (<= 57) of value into the stream at bit `position`; the bytes there must be
/// zero from that bit on, 8 bytes of room after position / 8.
LSHMOE_HOST_DEVICE inline void put_bits(std::uint8_t* stream, std::int64_t position,
                                        std::uint64_t value) {
  std::uint64_t word;
  std::memcpy(&word, stream + (position >> 3), 8);
  word |= value << (position & 7);
  std::memcpy(stream + (position >> 3), &word, 8);
}
/// Reads `bits` (<= 57) bits at bit `position`; 8 bytes must be readable from position / 8.
LSHMOE_HOST_DEVICE inline std::uint64_t get_bits(const std::uint8_t* stream, std::int64_t position,
                                                 int bits) {
  std::uint64_t word;
  std::memcpy(&word, stream + (position >> 3), 8);
  return word >> (position & 7) & ((std::uint64_t{1} << bits) - 1);
}

/// Alphabet of every band of one row, from its quantized values (all within kMaxQuantized).
/// index [ceil(count / 16)]. Returns the bits of the row's payload.
std::int64_t choose_alphabets(std::uint8_t* index, const std::int32_t* q, std::int64_t count);

/// Packs one row; stream must hold (bits + 7) / 8 bytes and 8 more, all zero.
void pack_bands(std::uint8_t* stream, const std::int32_t* q, std::int64_t count,
                const std::uint8_t* index);

/// Bits of the payload of `count` values whose bands have these alphabets.
[[nodiscard]] std::int64_t payload_bits(const std::uint8_t* index, std::int64_t count);

/// Unpacks one row; 8 bytes past the payload must be readable. False when a number is not one that
/// pack_bands writes: the stream is damaged.
[[nodiscard]] bool unpack_bands(std::int32_t* q, const std::uint8_t* stream, std::int64_t count,
                                const std::uint8_t* index);

}  // namespace lshmoe::kernels
