// Tensor formats: what a block of each looks like in a GGUF file, and the table of their sizes.
//
// Blocks are packed, little-endian, without alignment. Kernels include this header, so it uses no STL and defines
// nothing with external linkage. In the comments x[k] is weight k of the block and u its stored code.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "GGUF blocks are read in place: a little-endian machine is needed"
#endif

namespace pe {

enum class Act : int { F32, Q32, Q256 };  // how the activations facing a format are stored (kernels.h)

enum class Format : int {
#define PE_FORMAT(name, id, block, bytes, act) name,
#include "quant/formats.def"
#undef PE_FORMAT
  kCount
};
inline constexpr int kFormats = static_cast<int>(Format::kCount);

struct FormatInfo {
  const char* name;  // "Q4_K"
  int32_t type;      // GGUF type id
  uint32_t block;    // weights per block
  uint32_t bytes;    // bytes per block
  Act act;
};

static constexpr FormatInfo kFormatInfo[kFormats] = {
#define PE_FORMAT(name, id, block, bytes, act) {#name, id, block, bytes, Act::act},
#include "quant/formats.def"
#undef PE_FORMAT
};

static constexpr const FormatInfo& format_info(Format format) { return kFormatInfo[static_cast<int>(format)]; }

// The format with this GGUF type id. False, with *out untouched, when this build does not read it.
static constexpr bool format_from_type(int64_t type, Format* out) {
  for (int i = 0; i < kFormats; ++i) {
    if (kFormatInfo[i].type == type) {
      *out = static_cast<Format>(i);
      return true;
    }
  }
  return false;
}

// False for the formats that are only read: IQ1, IQ2, IQ3, TQ and MXFP4.
static constexpr bool can_quantise(Format format) {
  switch (format) {
    case Format::IQ2_XXS:
    case Format::IQ2_XS:
    case Format::IQ2_S:
    case Format::IQ3_XXS:
    case Format::IQ3_S:
    case Format::IQ1_S:
    case Format::IQ1_M:
    case Format::TQ1_0:
    case Format::TQ2_0:
    case Format::MXFP4: return false;
    default: return true;
  }
}

// Bytes of a row of cols weights; cols is a multiple of the block. The caller has checked that it cannot overflow
// (cols <= SIZE_MAX / 4 is enough for every format).
static constexpr size_t bytes_per_row(Format format, size_t cols) {
  return cols / format_info(format).block * format_info(format).bytes;
}

#pragma pack(push, 1)

// 32 weights. Code k of a nibble array: low half of qs[k] for k < 16, high half of qs[k - 16] otherwise. Bit k of qh:
// bit 4.
struct BlockQ4_0 {  // x = d (u - 8)
  uint16_t d;
  uint8_t qs[16];
};
struct BlockQ4_1 {  // x = d u + m
  uint16_t d, m;
  uint8_t qs[16];
};
struct BlockQ5_0 {  // x = d (u - 16)
  uint16_t d;
  uint8_t qh[4];
  uint8_t qs[16];
};
struct BlockQ5_1 {  // x = d u + m
  uint16_t d, m;
  uint8_t qh[4];
  uint8_t qs[16];
};
struct BlockQ8_0 {  // x = d q
  uint16_t d;
  int8_t qs[32];
};
struct BlockIQ4_NL {  // x = d kIq4Values[u]
  uint16_t d;
  uint8_t qs[16];
};

// 256 weights. Sub-block j: 16 or 32 consecutive weights with one integer scale (and minimum).
struct BlockQ2_K {     // sub-blocks of 16: x = d sc u - dmin mn
  uint8_t scales[16];  // sc in the low nibble, mn in the high
  uint8_t qs[64];      // bits 2 s, 2 s + 1 of qs[32 h + i]: code 128 h + 32 s + i
  uint16_t d, dmin;
};
struct BlockQ3_K {    // sub-blocks of 16: x = d (sc - 32) (u - 4)
  uint8_t hmask[32];  // bit b of hmask[i]: bit 2 of code 32 b + i
  uint8_t qs[64];     // the low two bits, as in Q2_K
  uint8_t
      scales[12];  // 6-bit sc: low nibbles in bytes 0-7 (j, j + 8), high pairs in bytes 8-11 (j % 4, shift 2 (j / 4))
  uint16_t d;
};
struct BlockQ4_K {  // sub-blocks of 32: x = d sc u - dmin mn
  uint16_t d, dmin;
  uint8_t scales[12];  // 6-bit sc, mn: unpack_scales_k4
  uint8_t qs[128];     // qs[32 c + i]: code 64 c + i in the low nibble, 64 c + 32 + i in the high
};
struct BlockQ5_K {  // as Q4_K, with a fifth bit
  uint16_t d, dmin;
  uint8_t scales[12];
  uint8_t qh[32];  // bit j of qh[i]: bit 4 of code 32 j + i
  uint8_t qs[128];
};
struct BlockQ6_K {  // sub-blocks of 16: x = d sc (u - 32)
  uint8_t ql[128];  // ql[64 h + i]: low nibbles of codes 128 h + i (low half) and 128 h + 64 + i (high half)
  uint8_t qh[64];   // bits 2 s, 2 s + 1 of qh[32 h + i]: bits 4, 5 of code 128 h + 32 s + i
  int8_t scales[16];
  uint16_t d;
};
struct BlockIQ4_XS {  // sub-blocks of 32: x = d (sc - 32) kIq4Values[u]
  uint16_t d;
  uint16_t scales_h;    // bits 2 j, 2 j + 1: bits 4, 5 of sc j
  uint8_t scales_l[4];  // low nibbles of sc 2 j (low half), 2 j + 1 (high half)
  uint8_t qs[128];      // qs[16 j + i]: code 32 j + i in the low nibble, 32 j + 16 + i in the high
};

// 256 weights of which eight (IQ2, IQ1) or four (IQ3) neighbours are an entry of a codebook (codebooks.h). IQ2 and IQ3:
// the entry holds magnitudes, and each weight has a sign bit. Where an entry is said to have 7 of them (signs8) the last
// is set when the others are odd in number: a field of 28 bits holds those of four entries. IQ1: an entry holds -1 .. 1,
// to which +-1/8 is added; the code is eight times that. Scales sc count half steps: 2 sc + 1.
struct BlockIQ2_XXS {  // sub-blocks of 32: x = d/8 (2 sc + 1) code
  uint16_t d;
  struct {
    uint8_t entry[4];
    uint32_t signs;  // 4 x 7 bits; sc in the top 4
  } sub[8];
};
struct BlockIQ2_XS {  // sub-blocks of 16: x = d/8 (2 sc + 1) code
  uint16_t d;
  uint16_t qs[32];    // entry in 9 bits, signs in 7
  uint8_t scales[8];  // sc of sub-blocks 2 j (low half), 2 j + 1 (high half)
};
struct BlockIQ2_S {  // sub-blocks of 16: x = d/8 (2 sc + 1) code
  uint16_t d;
  uint8_t qs[32];     // low 8 bits of an entry
  uint8_t signs[32];  // of its codes
  uint8_t qh[8];      // bits 2 i, 2 i + 1 of qh[j]: bits 8, 9 of entry 4 j + i
  uint8_t scales[8];
};
struct BlockIQ3_XXS {  // sub-blocks of 32: x = d/4 (2 sc + 1) code
  uint16_t d;
  uint8_t qs[64];     // entry
  uint32_t signs[8];  // of each sub-block: 4 x 7 bits, for eight codes each; sc in the top 4
};
struct BlockIQ3_S {  // sub-blocks of 32: x = d (2 sc + 1) code
  uint16_t d;
  uint8_t qs[64];     // low 8 bits of an entry
  uint8_t qh[8];      // bit i of qh[j]: bit 8 of entry 8 j + i
  uint8_t signs[32];  // of eight codes each
  uint8_t scales[4];  // sc of sub-blocks 2 j (low half), 2 j + 1 (high half)
};
struct BlockIQ1_S {  // sub-blocks of 32: x = d/8 (2 sc + 1) code
  uint16_t d;
  uint8_t qs[32];  // low 8 bits of an entry
  uint16_t qh[8];  // of each sub-block: 4 x bits 8, 9, 10 of an entry, sc in 3 bits, the top bit: 1/8 is subtracted
};
struct BlockIQ1_M {    // sub-blocks of 16: x = d/8 (2 sc + 1) code
  uint8_t qs[32];      // low 8 bits of an entry
  uint8_t qh[16];      // a nibble for each entry: its bits 8, 9, 10, and whether 1/8 is subtracted
  uint16_t scales[4];  // sc of sub-blocks 4 j .. 4 j + 3 in 3 bits each; in the top 4 bits of the four words: d
};

// 256 ternary weights, codes -1 .. 1 (TQ2_0 can hold a 2).
struct BlockTQ1_0 {  // x = d (u - 1), u a digit to the base 3: trit()
  uint8_t qs[48];    // digit n of qs[i]: code 32 n + i for i < 32, 128 + 16 n + i for the others
  uint8_t qh[4];     // digit n of qh[i]: code 240 + 4 n + i
  uint16_t d;
};
struct BlockTQ2_0 {  // x = d (u - 1)
  uint8_t qs[64];    // as in Q2_K
  uint16_t d;
};

// 32 weights: the OCP microscaling format.
struct BlockMXFP4 {  // x = d kMxfp4Values[u]
  uint8_t e;         // d = 2^(e - 128): half of the power that E8M0 means, the values being twice those of E2M1
  uint8_t qs[16];    // nibbles
};

#pragma pack(pop)

#define PE_CHECK_BLOCK(name, weights) \
  static_assert(sizeof(Block##name) == format_info(Format::name).bytes && format_info(Format::name).block == weights)
PE_CHECK_BLOCK(Q4_0, 32);
PE_CHECK_BLOCK(Q4_1, 32);
PE_CHECK_BLOCK(Q5_0, 32);
PE_CHECK_BLOCK(Q5_1, 32);
PE_CHECK_BLOCK(Q8_0, 32);
PE_CHECK_BLOCK(IQ4_NL, 32);
PE_CHECK_BLOCK(Q2_K, 256);
PE_CHECK_BLOCK(Q3_K, 256);
PE_CHECK_BLOCK(Q4_K, 256);
PE_CHECK_BLOCK(Q5_K, 256);
PE_CHECK_BLOCK(Q6_K, 256);
PE_CHECK_BLOCK(IQ4_XS, 256);
PE_CHECK_BLOCK(IQ2_XXS, 256);
PE_CHECK_BLOCK(IQ2_XS, 256);
PE_CHECK_BLOCK(IQ2_S, 256);
PE_CHECK_BLOCK(IQ3_XXS, 256);
PE_CHECK_BLOCK(IQ3_S, 256);
PE_CHECK_BLOCK(IQ1_S, 256);
PE_CHECK_BLOCK(IQ1_M, 256);
PE_CHECK_BLOCK(TQ1_0, 256);
PE_CHECK_BLOCK(TQ2_0, 256);
PE_CHECK_BLOCK(MXFP4, 32);
#undef PE_CHECK_BLOCK

// The 16 levels of the IQ4 formats.
static constexpr int8_t kIq4Values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
// Those of MXFP4, doubled: the top bit of a code is its sign.
static constexpr int8_t kMxfp4Values[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// The bits of the float 2^(e - 128).
static inline uint32_t mxfp4_scale_bits(uint8_t e) {
  return e < 2 ? static_cast<uint32_t>(0x00200000) << e : static_cast<uint32_t>(e - 1) << 23;
}

// The fp16 that an IQ1_M block spreads over its scales.
static inline uint16_t iq1m_scale(const uint16_t s[4]) {
  return static_cast<uint16_t>((s[0] >> 12) | ((s[1] >> 12) << 4) | ((s[2] >> 12) << 8) | (s[3] & 0xf000));
}

// Eight sign bits from the seven that are stored.
static inline uint8_t signs8(uint32_t seven) {
  const uint32_t b = seven & 127, p = b ^ (b >> 4), q = p ^ (p >> 2);
  return static_cast<uint8_t>(b | ((q ^ (q >> 1)) & 1) << 7);
}

// Digit n of a byte of TQ1_0, the byte being a fraction to the base 3: n = 0 .. 4 is the one after n others.
static inline int trit(uint8_t byte, int n) {
  static constexpr uint8_t kPower[5] = {1, 3, 9, 27, 81};
  return (static_cast<uint8_t>(byte * kPower[n]) * 3) >> 8;
}

// Q4_K and Q5_K pack eight 6-bit scales (capitals) and minima (small letters) into 12 bytes:
//   bytes 0-3   EEAAAAAA FFBBBBBB GGCCCCCC HHDDDDDD
//   bytes 4-7   eeaaaaaa ffbbbbbb ggcccccc hhdddddd
//   bytes 8-11  eeeeEEEE ffffFFFF ggggGGGG hhhhHHHH
static inline void unpack_scales_k4(const uint8_t packed[12], uint8_t scale[8], uint8_t min[8]) {
  for (int j = 0; j < 4; ++j) {
    scale[j] = packed[j] & 63;
    min[j] = packed[j + 4] & 63;
    scale[j + 4] = static_cast<uint8_t>((packed[j + 8] & 15) | ((packed[j] >> 6) << 4));
    min[j + 4] = static_cast<uint8_t>((packed[j + 8] >> 4) | ((packed[j + 4] >> 6) << 4));
  }
}

static inline void pack_scales_k4(const uint8_t scale[8], const uint8_t min[8], uint8_t packed[12]) {
  for (int j = 0; j < 4; ++j) {
    packed[j] = static_cast<uint8_t>(scale[j] | ((scale[j + 4] >> 4) << 6));
    packed[j + 4] = static_cast<uint8_t>(min[j] | ((min[j + 4] >> 4) << 6));
    packed[j + 8] = static_cast<uint8_t>((scale[j + 4] & 15) | ((min[j + 4] & 15) << 4));
  }
}

}  // namespace pe
