#include "lshmoe/kernels/bands.hpp"

#include <algorithm>
#include <cstring>

namespace lshmoe::kernels {
namespace {
// Vectors of GCC and Clang: the compilers do not find these shuffles in plain loops.
using Int4 = std::int32_t __attribute__((vector_size(16)));
using Int8 = std::int32_t __attribute__((vector_size(32)));
using Float8 = float __attribute__((vector_size(32)));
using Double4 = double __attribute__((vector_size(32)));

// At any address of an integer; one instruction each.
Int8 load(const std::int32_t* from) {
  Int8 vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}
void store(std::int32_t* to, Int8 vector) { std::memcpy(to, &vector, sizeof vector); }

// By alphabet: bits of a full band, reciprocals of the size and its square.
struct BandTable {
  std::int32_t bits[kAlphabets];
  float inverse[kAlphabets];
  double inverse2[kAlphabets];
};
constexpr BandTable make_band_table() {
  BandTable table{};
  for (int i = 0; i < kAlphabets; ++i) {
    const auto size = static_cast<std::int32_t>(kAlphabetSizes[i]);
    table.bits[i] = 2 * kAlphabetTable.alphabet[i].bits[kUnitValues];
    table.inverse[i] = 1.0F / static_cast<float>(size);
    table.inverse2[i] = 1.0 / static_cast<double>(std::int64_t{size} * size);
  }
  return table;
}
constexpr BandTable kBandTable = make_band_table();

// Writes bits one after another; bytes up to 8 behind the last bit become zero.
class BitWriter {
 public:
  explicit BitWriter(std::uint8_t* stream) : at_(stream) {}
  // bits <= 57, value below 2^bits.
  void put(std::uint64_t value, int bits) {
    word_ |= value << filled_;
    std::memcpy(at_, &word_, 8);
    const int filled = filled_ + bits;
    at_ += filled >> 3;
    // 64 bits would be too many for one shift.
    word_ = word_ >> (filled & ~7 & 63);
    filled_ = filled & 7;
  }

 private:
  std::uint8_t* at_;
  std::uint64_t word_ = 0;
  int filled_ = 0;
};

// The two numbers of 16 values.
struct Numbers {
  std::uint64_t number[2];
};
Numbers join_band(const Alphabet& alphabet, const std::int32_t* q) {
  const auto a = static_cast<std::int32_t>(alphabet.size);
  const Int8 low = load(q) + alphabet.half, high = load(q + 8) + alphabet.half;
  const Int8 pair = __builtin_shufflevector(low, high, 0, 2, 4, 6, 8, 10, 12, 14) +
                    a * __builtin_shufflevector(low, high, 1, 3, 5, 7, 9, 11, 13, 15);
  const Int4 quad = __builtin_shufflevector(pair, pair, 0, 2, 4, 6) +
                    a * a * __builtin_shufflevector(pair, pair, 1, 3, 5, 7);
  const auto at = [&quad](int i) {
    return static_cast<std::uint64_t>(static_cast<std::uint32_t>(quad[i]));
  };
  const std::uint64_t a4 = alphabet.power[4];
  return {{at(0) + a4 * at(1), at(2) + a4 * at(3)}};
}

// split_digits of two numbers, less alphabet.half. Quotients by floating point: half a unit more
// keeps them further from the next integer than they can err, at dividends below 2^28 and 2^14.
void split_band(int index, const std::uint64_t* number, std::int32_t* q) {
  const Alphabet& alphabet = kAlphabetTable.alphabet[index];
  const std::uint64_t a4 = alphabet.power[4];
  const auto a = static_cast<std::int32_t>(alphabet.size), a2 = a * a;
  Int4 quad{};
  for (int i = 0; i < 2; ++i) {
    auto upper = static_cast<std::uint64_t>(
        static_cast<unsigned __int128>(number[i]) * alphabet.reciprocal4 >> 64);
    std::uint64_t lower = number[i] - upper * a4;
    upper += lower >= a4 ? 1 : 0;
    lower -= lower >= a4 ? a4 : 0;
    quad[2 * i] = static_cast<std::int32_t>(lower);
    quad[2 * i + 1] = static_cast<std::int32_t>(upper);
  }
  const Int4 upper_pair = __builtin_convertvector(
      (__builtin_convertvector(quad, Double4) + 0.5) * kBandTable.inverse2[index], Int4);
  const Int4 lower_pair = quad - upper_pair * a2;
  const Int8 pair = __builtin_shufflevector(lower_pair, upper_pair, 0, 4, 1, 5, 2, 6, 3, 7);
  const Int8 second = __builtin_convertvector(
      (__builtin_convertvector(pair, Float8) + 0.5F) * kBandTable.inverse[index], Int8);
  const Int8 first = pair - second * a;
  store(q, __builtin_shufflevector(first, second, 0, 8, 1, 9, 2, 10, 3, 11) - alphabet.half);
  store(q + 8, __builtin_shufflevector(first, second, 4, 12, 5, 13, 6, 14, 7, 15) - alphabet.half);
}

// Of 16 values.
std::int32_t max_abs(const std::int32_t* q) {
  const auto size = [](Int8 v) { return v < 0 ? -v : v; };
  const auto larger = [](auto a, auto b) { return a > b ? a : b; };
  const Int8 m8 = larger(size(load(q)), size(load(q + 8)));
  const Int4 m4 = larger(__builtin_shufflevector(m8, m8, 0, 1, 2, 3),
                         __builtin_shufflevector(m8, m8, 4, 5, 6, 7));
  const Int4 m2 = larger(m4, __builtin_shufflevector(m4, m4, 2, 3, 0, 1));
  return std::max(m2[0], m2[1]);
}
}  // namespace

std::int64_t choose_alphabets(std::uint8_t* index, const std::int32_t* q, std::int64_t count) {
  std::int64_t bits = 0;
  const std::int64_t full = count / kBandValues;
  for (std::int64_t band = 0; band < full; ++band) {
    const int chosen = alphabet_for(max_abs(q + band * kBandValues));
    index[band] = static_cast<std::uint8_t>(chosen);
    bits += kBandTable.bits[chosen];
  }
  const auto left = static_cast<int>(count % kBandValues);
  if (left > 0) {
    std::int32_t padded[kBandValues] = {};
    std::copy_n(q + full * kBandValues, left, padded);
    const int chosen = alphabet_for(max_abs(padded));
    index[full] = static_cast<std::uint8_t>(chosen);
    bits += band_bits(chosen, left);
  }
  return bits;
}

void pack_bands(std::uint8_t* stream, const std::int32_t* q, std::int64_t count,
                const std::uint8_t* index) {
  BitWriter writer(stream);
  for (std::int64_t first = 0; first < count; first += kBandValues) {
    const int chosen = index[first / kBandValues];
    if (chosen == 0) continue;
    const Alphabet& alphabet = kAlphabetTable.alphabet[chosen];
    const int values = static_cast<int>(std::min<std::int64_t>(kBandValues, count - first));
    const std::int32_t* from = q + first;
    if (chosen >= kFirstWideAlphabet) {
      for (int i = 0; i < values; ++i) {
        writer.put(static_cast<std::uint64_t>(from[i] + alphabet.half), alphabet.bits[1]);
      }
      continue;
    }
    std::int32_t padded[kBandValues];
    if (values < kBandValues) {
      // Digits 0 behind the last value leave the number as it is.
      std::fill_n(padded, kBandValues, -alphabet.half);
      std::copy_n(from, values, padded);
      from = padded;
    }
    const Numbers joined = join_band(alphabet, from);
    writer.put(joined.number[0], alphabet.bits[std::min(values, kUnitValues)]);
    if (values > kUnitValues) writer.put(joined.number[1], alphabet.bits[values - kUnitValues]);
  }
}

std::int64_t payload_bits(const std::uint8_t* index, std::int64_t count) {
  std::int64_t bits = 0;
  const std::int64_t full = count / kBandValues;
  for (std::int64_t band = 0; band < full; ++band) bits += kBandTable.bits[index[band]];
  if (count % kBandValues != 0) {
    bits += band_bits(index[full], static_cast<int>(count % kBandValues));
  }
  return bits;
}

namespace {
// Reads one band; false when it holds a number that pack_bands does not write.
bool unpack_wide(std::int32_t* q, const std::uint8_t* stream, std::int64_t position,
                 const Alphabet& alphabet, int values) {
  bool valid = true;
  for (int i = 0; i < values; ++i) {
    const auto digit = static_cast<std::int32_t>(
        get_bits(stream, position + i * alphabet.bits[1], alphabet.bits[1]));
    valid &= digit < static_cast<std::int32_t>(alphabet.size);
    q[i] = digit - alphabet.half;
  }
  return valid;
}
bool unpack_full(std::int32_t* q, const std::uint8_t* stream, std::int64_t position, int index) {
  const Alphabet& alphabet = kAlphabetTable.alphabet[index];
  const int bits = alphabet.bits[kUnitValues];
  const std::uint64_t number[2] = {get_bits(stream, position, bits),
                                   get_bits(stream, position + bits, bits)};
  split_band(index, number, q);
  return number[0] < alphabet.power[kUnitValues] && number[1] < alphabet.power[kUnitValues];
}
bool unpack_last(std::int32_t* q, const std::uint8_t* stream, std::int64_t position, int index,
                 int values) {
  const Alphabet& alphabet = kAlphabetTable.alphabet[index];
  bool valid = true;
  for (int first = 0; first < values; first += kUnitValues) {
    const int count = std::min(values - first, kUnitValues);
    const std::uint64_t number = get_bits(stream, position, alphabet.bits[count]);
    position += alphabet.bits[count];
    valid &= number < alphabet.power[count];
    std::uint32_t digit[kUnitValues];
    split_digits(alphabet, number, digit);
    for (int i = 0; i < count; ++i) {
      q[first + i] = static_cast<std::int32_t>(digit[i]) - alphabet.half;
    }
  }
  return valid;
}
}  // namespace

bool unpack_bands(std::int32_t* q, const std::uint8_t* stream, std::int64_t count,
                  const std::uint8_t* index) {
  std::int64_t position = 0;
  bool valid = true;
  const std::int64_t full = count / kBandValues;
  for (std::int64_t band = 0; band < full; ++band, q += kBandValues) {
    const int chosen = index[band];
    if (chosen == 0) {
      std::fill_n(q, kBandValues, 0);
    } else if (chosen < kFirstWideAlphabet) {
      valid &= unpack_full(q, stream, position, chosen);
    } else {
      valid &= unpack_wide(q, stream, position, kAlphabetTable.alphabet[chosen], kBandValues);
    }
    position += kBandTable.bits[chosen];
  }
  const auto left = static_cast<int>(count % kBandValues);
  if (left > 0) {
    const int chosen = index[full];
    valid &= chosen < kFirstWideAlphabet
                 ? unpack_last(q, stream, position, chosen, left)
                 : unpack_wide(q, stream, position, kAlphabetTable.alphabet[chosen], left);
  }
  return valid;
}

}  // namespace lshmoe::kernels
