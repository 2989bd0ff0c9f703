// The specification of the linear kernels: dequantise, quantise_act, linear for every format (contract: kernels.h).
//
// Every quantised format is described by one function, unpack(), that turns a block into plain integers. Dequantisation
// and the dot product are then the same few lines for all of them. Nothing here is meant to be fast.
#include <math.h>
#include <string.h>

#include "kernels/tiers.h"
#include "quant/codebooks.h"
#include "quant/fp16.h"

namespace pe {
namespace {

// ---- blocks as integers ----

constexpr int kSub = 16;  // the finest sub-block of any format; those of 32 repeat their scale

// weight k of the block = d * scale[k / 16] * code[k] - dmin * min[k / 16]
struct Codes {
  int code[256];
  int scale[256 / kSub];
  int min[256 / kSub];
  float d, dmin;
};

void set_scales(Codes* c, int n, int scale, int min) {
  for (int j = 0; j < n / kSub; ++j) {
    c->scale[j] = scale;
    c->min[j] = min;
  }
}

int nibble(const uint8_t qs[16], int k) { return k < 16 ? qs[k] & 15 : qs[k - 16] >> 4; }
int bit(const uint8_t* bits, int k) { return (bits[k / 8] >> (k % 8)) & 1; }
// Code k of the layouts that store pairs of bits: bits 2 s, 2 s + 1 of byte 32 h + i hold code 128 h + 32 s + i.
int crumb(const uint8_t qs[64], int k) { return (qs[k / 128 * 32 + k % 32] >> (k % 128 / 32 * 2)) & 3; }
// The same for nibbles in runs of `run`: byte run * c + i holds codes 2 run c + i (low half), 2 run c + run + i (high).
int run_nibble(const uint8_t* qs, int run, int k) {
  return (qs[k / (2 * run) * run + k % run] >> (k % (2 * run) / run * 4)) & 15;
}

struct Q4_0 {
  using Block = BlockQ4_0;
  static constexpr bool kMin = false;
  static void unpack(const Block& b, Codes* c) {
    c->d = f16_to_f32(b.d);
    set_scales(c, 32, 1, 0);
    for (int k = 0; k < 32; ++k) c->code[k] = nibble(b.qs, k) - 8;
  }
};

// A minimum added with its own scale m is one subtracted with dmin = -m: the same bits.
struct Q4_1 {
  using Block = BlockQ4_1;
  static constexpr bool kMin = true;
  static void unpack(const Block& b, Codes* c) {
    c->d = f16_to_f32(b.d);
    c->dmin = -f16_to_f32(b.m);
    set_scales(c, 32, 1, 1);
    for (int k = 0; k < 32; ++k) c->code[k] = nibble(b.qs, k);
  }
};

struct Q5_0 {
  using Block = BlockQ5_0;
  static constexpr bool kMin = false;
  static void unpack(const Block& b, Codes* c) {
    c->d = f16_to_f32(b.d);
    set_scales(c, 32, 1, 0);
    for (int k = 0; k < 32; ++k) c->code[k] = (nibble(b.qs, k) | bit(b.qh, k) << 4) - 16;
  }
};

struct Q5_1 {
  using Block = BlockQ5_1;
  static constexpr bool kMin = true;
  static void unpack(const Block& b, Codes* c) {
    c->d = f16_to_f32(b.d);
    c->dmin = -f16_to_f32(b.m);
    set_scales(c, 32, 1, 1);
    for (int k = 0; k < 32; ++k) c->code[k] = nibble(b.qs, k) | bit(b.qh, k) << 4;
  }
};

struct Q8_0 {
  using Block = BlockQ8_0;
  static constexpr bool kMin = false;
  static void unpack(const Block& b, Codes* c) {
    c->d = f16_to_f32(b.d);
    set_scales(c, 32, 1, 0);
    for (int k = 0; k < 32; ++k) c->code[k] = b.qs[k];
  }
};

struct IQ4_NL {
  using Block = BlockIQ4_NL;
  static constexpr bool kMin = false;
  static void unpack(const Block& b, Codes* c) {
    c->d = f16_to_f32(b.d);
    set_scales(c, 32, 1, 0);
    for (int k = 0; k < 32; ++k) c->code[k] = kIq4Values[nibble(b.qs, k)];
  }
};

struct Q2_K {
  using Block = BlockQ2_K;
  static constexpr bool kMin = true;
  static void unpack(const Block& b, Codes* c) {
    c->d = f16_to_f32(b.d);
    c->dmin = f16_to_f32(b.dmin);
    for (int j = 0; j < 16; ++j) {
      c->scale[j] = b.scales[j] & 15;
      c->min[j] = b.scales[j] >> 4;
    }
    for (int k = 0; k < 256; ++k) c->code[k] = crumb(b.qs, k);
  }
};

struct Q3_K {
  using Block = BlockQ3_K;
  static constexpr bool kMin = false;
  static void unpack(const Block& b, Codes* c) {
    c->d = f16_to_f32(b.d);
    for (int j = 0; j < 16; ++j) {
      const int low = j < 8 ? b.scales[j] & 15 : b.scales[j - 8] >> 4;
      const int high = (b.scales[8 + j % 4] >> (j / 4 * 2)) & 3;
      c->scale[j] = (low | high << 4) - 32;
    }
    for (int k = 0; k < 256; ++k) c->code[k] = (crumb(b.qs, k) | ((b.hmask[k % 32] >> (k / 32)) & 1) << 2) - 4;
  }
};

void unpack_k4(const uint8_t packed[12], Codes* c) {
  uint8_t scale[8], min[8];
  unpack_scales_k4(packed, scale, min);
  for (int j = 0; j < 16; ++j) {
    c->scale[j] = scale[j / 2];
    c->min[j] = min[j / 2];
  }
}

struct Q4_K {
  using Block = BlockQ4_K;
  static constexpr bool kMin = true;
  static void unpack(const Block& b, Codes* c) {
    c->d = f16_to_f32(b.d);
    c->dmin = f16_to_f32(b.dmin);
    unpack_k4(b.scales, c);
    for (int k = 0; k < 256; ++k) c->code[k] = run_nibble(b.qs, 32, k);
  }
};

struct Q5_K {
  using Block = BlockQ5_K;
  static constexpr bool kMin = true;
  static void unpack(const Block& b, Codes* c) {
    c->d = f16_to_f32(b.d);
    c->dmin = f16_to_f32(b.dmin);
    unpack_k4(b.scales, c);
    for (int k = 0; k < 256; ++k) c->code[k] = run_nibble(b.qs, 32, k) | ((b.qh[k % 32] >> (k / 32)) & 1) << 4;
  }
};

struct Q6_K {
  using Block = BlockQ6_K;
  static constexpr bool kMin = false;
  static void unpack(const Block& b, Codes* c) {
    c->d = f16_to_f32(b.d);
    for (int j = 0; j < 16; ++j) c->scale[j] = b.scales[j];
    for (int k = 0; k < 256; ++k) c->code[k] = (run_nibble(b.ql, 64, k) | crumb(b.qh, k) << 4) - 32;
  }
};

struct IQ4_XS {
  using Block = BlockIQ4_XS;
  static constexpr bool kMin = false;
  static void unpack(const Block& b, Codes* c) {
    c->d = f16_to_f32(b.d);
    for (int j = 0; j < 8; ++j) {
      const int scale = (run_nibble(b.scales_l, 1, j) | ((b.scales_h >> (2 * j)) & 3) << 4) - 32;
      c->scale[2 * j] = c->scale[2 * j + 1] = scale;
    }
    for (int k = 0; k < 256; ++k) c->code[k] = kIq4Values[run_nibble(b.qs, 16, k)];
  }
};

struct MXFP4 {
  using Block = BlockMXFP4;
  static constexpr bool kMin = false;
  static void unpack(const Block& b, Codes* c) {
    c->d = bits_float(mxfp4_scale_bits(b.e));
    set_scales(c, 32, 1, 0);
    for (int k = 0; k < 32; ++k) c->code[k] = kMxfp4Values[nibble(b.qs, k)];
  }
};

// The codes of an entry of a codebook: eight or four.
void set_iq2(uint16_t entry, uint8_t signs, int code[8]) {
  for (int k = 0; k < 8; ++k) {
    const int level = kIq2Levels[(entry >> (2 * k)) & 3];
    code[k] = bit(&signs, k) ? -level : level;
  }
}

void set_iq3(int (*level)(int), uint16_t entry, int signs, int code[4]) {
  for (int k = 0; k < 4; ++k) {
    const int value = level((entry >> (4 * k)) & 15);
    code[k] = (signs >> k) & 1 ? -value : value;
  }
}

void set_iq1(uint16_t entry, bool subtract, int code[8]) {
  for (int k = 0; k < 8; ++k) code[k] = 8 * (((entry >> (2 * k)) & 3) - 1) + (subtract ? -1 : 1);
}

void set_odd_scale(Codes* c, int first, int n, int sc) {
  for (int j = first; j < first + n; ++j) c->scale[j] = 2 * sc + 1;
}

struct IQ2_XXS {
  using Block = BlockIQ2_XXS;
  static constexpr bool kMin = false;
  static void unpack(const Block& b, Codes* c) {
    c->d = f16_to_f32(b.d) * 0.125f;
    for (int j = 0; j < 8; ++j) {
      const uint32_t signs = b.sub[j].signs;
      set_odd_scale(c, 2 * j, 2, static_cast<int>(signs >> 28));
      for (int i = 0; i < 4; ++i) {
        set_iq2(kIq2XxsGrid[b.sub[j].entry[i]], signs8(signs >> (7 * i)), c->code + 32 * j + 8 * i);
      }
    }
  }
};

struct IQ2_XS {
  using Block = BlockIQ2_XS;
  static constexpr bool kMin = false;
  static void unpack(const Block& b, Codes* c) {
    c->d = f16_to_f32(b.d) * 0.125f;
    for (int j = 0; j < 16; ++j) set_odd_scale(c, j, 1, run_nibble(b.scales, 1, j));
    for (int i = 0; i < 32; ++i) set_iq2(kIq2XsGrid[b.qs[i] & 511], signs8(b.qs[i] >> 9), c->code + 8 * i);
  }
};

struct IQ2_S {
  using Block = BlockIQ2_S;
  static constexpr bool kMin = false;
  static void unpack(const Block& b, Codes* c) {
    c->d = f16_to_f32(b.d) * 0.125f;
    for (int j = 0; j < 16; ++j) set_odd_scale(c, j, 1, run_nibble(b.scales, 1, j));
    for (int i = 0; i < 32; ++i) {
      const int high = (b.qh[i / 4] >> (i % 4 * 2)) & 3;
      set_iq2(kIq2SGrid[b.qs[i] | high << 8], b.signs[i], c->code + 8 * i);
    }
  }
};

struct IQ3_XXS {
  using Block = BlockIQ3_XXS;
  static constexpr bool kMin = false;
  static int level(int u) { return kIq3Levels[u]; }
  static void unpack(const Block& b, Codes* c) {
    c->d = f16_to_f32(b.d) * 0.25f;
    for (int j = 0; j < 8; ++j) set_odd_scale(c, 2 * j, 2, static_cast<int>(b.signs[j] >> 28));
    for (int i = 0; i < 64; ++i) {
      const int signs = signs8(b.signs[i / 8] >> (i % 8 / 2 * 7)) >> (i % 2 * 4);
      set_iq3(level, kIq3XxsGrid[b.qs[i]], signs, c->code + 4 * i);
    }
  }
};

struct IQ3_S {
  using Block = BlockIQ3_S;
  static constexpr bool kMin = false;
  static int level(int u) { return 2 * u + 1; }
  static void unpack(const Block& b, Codes* c) {
    c->d = f16_to_f32(b.d);
    for (int j = 0; j < 8; ++j) set_odd_scale(c, 2 * j, 2, run_nibble(b.scales, 1, j));
    for (int i = 0; i < 64; ++i) {
      set_iq3(level, kIq3SGrid[b.qs[i] | bit(b.qh, i) << 8], b.signs[i / 2] >> (i % 2 * 4), c->code + 4 * i);
    }
  }
};

struct IQ1_S {
  using Block = BlockIQ1_S;
  static constexpr bool kMin = false;
  static void unpack(const Block& b, Codes* c) {
    c->d = f16_to_f32(b.d) * 0.125f;
    for (int j = 0; j < 8; ++j) {
      const int h = b.qh[j];
      set_odd_scale(c, 2 * j, 2, (h >> 12) & 7);
      for (int i = 4 * j; i < 4 * j + 4; ++i) {
        set_iq1(kIq1Grid[b.qs[i] | ((h >> (i % 4 * 3)) & 7) << 8], h >> 15, c->code + 8 * i);
      }
    }
  }
};

struct IQ1_M {
  using Block = BlockIQ1_M;
  static constexpr bool kMin = false;
  static void unpack(const Block& b, Codes* c) {
    const uint16_t words[4] = {b.scales[0], b.scales[1], b.scales[2], b.scales[3]};
    c->d = f16_to_f32(iq1m_scale(words)) * 0.125f;
    for (int j = 0; j < 16; ++j) set_odd_scale(c, j, 1, (words[j / 4] >> (j % 4 * 3)) & 7);
    for (int i = 0; i < 32; ++i) {
      const int h = run_nibble(b.qh, 1, i);
      set_iq1(kIq1Grid[b.qs[i] | (h & 7) << 8], h >> 3, c->code + 8 * i);
    }
  }
};

struct TQ1_0 {
  using Block = BlockTQ1_0;
  static constexpr bool kMin = false;
  static void unpack(const Block& b, Codes* c) {
    c->d = f16_to_f32(b.d);
    set_scales(c, 256, 1, 0);
    for (int n = 0; n < 5; ++n) {
      for (int i = 0; i < 32; ++i) c->code[32 * n + i] = trit(b.qs[i], n) - 1;
      for (int i = 0; i < 16; ++i) c->code[160 + 16 * n + i] = trit(b.qs[32 + i], n) - 1;
      for (int i = 0; i < 4 && n < 4; ++i) c->code[240 + 4 * n + i] = trit(b.qh[i], n) - 1;
    }
  }
};

struct TQ2_0 {
  using Block = BlockTQ2_0;
  static constexpr bool kMin = false;
  static void unpack(const Block& b, Codes* c) {
    c->d = f16_to_f32(b.d);
    set_scales(c, 256, 1, 0);
    for (int k = 0; k < 256; ++k) c->code[k] = crumb(b.qs, k) - 1;
  }
};

// ---- dequantise ----

template <class F, size_t kBlock>
void dequantise(const void* src, size_t n, float* dst) {
  const auto* block = static_cast<const typename F::Block*>(src);
  for (size_t at = 0; at < n; at += kBlock, ++block) {
    Codes c;
    F::unpack(*block, &c);
    for (size_t k = 0; k < kBlock; ++k) {
      const float x = c.d * static_cast<float>(c.scale[k / kSub]) * static_cast<float>(c.code[k]);
      if constexpr (F::kMin) {
        dst[at + k] = x - c.dmin * static_cast<float>(c.min[k / kSub]);
      } else {
        dst[at + k] = x;
      }
    }
  }
}

// The float formats: weight k of a row that may lie at any address.
struct F32 {
  static float load(const uint8_t* row, size_t k) {
    float x;
    memcpy(&x, row + 4 * k, 4);
    return x;
  }
};
struct F16 {
  static float load(const uint8_t* row, size_t k) {
    uint16_t h;
    memcpy(&h, row + 2 * k, 2);
    return f16_to_f32(h);
  }
};
struct BF16 {
  static float load(const uint8_t* row, size_t k) {
    uint16_t h;
    memcpy(&h, row + 2 * k, 2);
    return bf16_to_f32(h);
  }
};

template <class F>
void widen(const void* src, size_t n, float* dst) {
  for (size_t k = 0; k < n; ++k) dst[k] = F::load(static_cast<const uint8_t*>(src), k);
}

// ---- activations ----

void copy_act(const float* x, size_t n, void* row) { memcpy(row, x, 4 * n); }

template <size_t kBlock>
void quantise_act(const float* x, size_t n, void* row) {
  const ActLayout at = act_layout(kBlock == 32 ? Act::Q32 : Act::Q256, n);
  int8_t* q = static_cast<int8_t*>(row);
  float* scale = reinterpret_cast<float*>(q + at.scale_at);
  int16_t* sum = reinterpret_cast<int16_t*>(q + at.sum_at);
  int16_t* sum16 = reinterpret_cast<int16_t*>(q + at.sum16_at);
  int16_t* sum32 = reinterpret_cast<int16_t*>(q + at.sum32_at);
  memset(sum, 0, 2 * (n / 8));
  for (size_t b = 0; b < n / kBlock; ++b) {
    float amax = 0;
    bool finite = true;
    for (size_t k = b * kBlock; k < (b + 1) * kBlock; ++k) {
      finite = finite && is_finite(x[k]);
      if (fabsf(x[k]) > amax) amax = fabsf(x[k]);
    }
    const float inv = 127 / amax;
    const bool zero = finite && !is_finite(inv);  // amax is 0, or too small to be inverted
    scale[b] = !finite ? bits_float(0x7fc00000) : zero ? 0 : amax / 127;
    for (size_t k = b * kBlock; k < (b + 1) * kBlock; ++k) {
      int code = 0;
      if (finite && !zero) {
        code = static_cast<int>(nearbyintf(x[k] * inv));
        code = code > 127 ? 127 : code < -127 ? -127 : code;
      }
      q[k] = static_cast<int8_t>(code);
      sum[k / 16 * 2 + (k % 4 >= 2)] = static_cast<int16_t>(sum[k / 16 * 2 + (k % 4 >= 2)] + code);
    }
  }
  for (size_t i = 0; i < n / 16; ++i) sum16[i] = static_cast<int16_t>(sum[2 * i] + sum[2 * i + 1]);
  for (size_t i = 0; i < n / 32; ++i) sum32[i] = static_cast<int16_t>(sum16[2 * i] + sum16[2 * i + 1]);
}

// ---- linear ----

// One block of a row against one of a token: the next link of the chain that starts at acc.
template <class F, size_t kBlock>
float add_block(const Codes& c, const int8_t* q, float a, float acc) {
  int dot = 0, mins = 0;  // |dot| <= 256 * 127 * 127 * 32 (IQ4_XS) or 256 * 32 * 127 * 128 (Q6_K): fits, as all do
  for (size_t j = 0; j < kBlock / kSub; ++j) {
    int products = 0, sum = 0;
    for (size_t k = j * kSub; k < (j + 1) * kSub; ++k) {
      products += c.code[k] * q[k];
      sum += q[k];
    }
    dot += c.scale[j] * products;
    if constexpr (F::kMin) mins += c.min[j] * sum;
  }
  acc = fmaf(c.d * a, static_cast<float>(dot), acc);
  if constexpr (F::kMin) acc = fmaf(-(c.dmin * a), static_cast<float>(mins), acc);
  return acc;
}

template <class F, size_t kBlock>
void linear(const LinearArgs& args) {
  const ActLayout at = act_layout(kBlock == 32 ? Act::Q32 : Act::Q256, args.cols);
  for (size_t r = 0; r < args.rows; ++r) {
    const uint8_t* row = static_cast<const uint8_t*>(args.w) + r * args.w_stride;
    for (size_t t = 0; t < args.tokens; ++t) args.y[t * args.y_stride + r] = 0;
    for (size_t b = 0; b < args.cols / kBlock; ++b) {
      Codes c;
      F::unpack(reinterpret_cast<const typename F::Block*>(row)[b], &c);
      for (size_t t = 0; t < args.tokens; ++t) {
        const int8_t* q = static_cast<const int8_t*>(args.x) + t * args.x_stride;
        const float* scale = reinterpret_cast<const float*>(q + at.scale_at);
        float* y = args.y + t * args.y_stride + r;
        *y = add_block<F, kBlock>(c, q + b * kBlock, scale[b], *y);
      }
    }
  }
}

// dot16 of kernels.h.
template <class F>
float dot16(const uint8_t* row, const float* x, size_t n) {
  float lane[16] = {};
  for (size_t k = 0; k < n; ++k) lane[k % 16] = fmaf(F::load(row, k), x[k], lane[k % 16]);
  for (int h = 8; h > 0; h /= 2) {
    for (int i = 0; i < h; ++i) lane[i] += lane[i + h];
  }
  return lane[0];
}

template <class F>
void linear_float(const LinearArgs& args) {
  for (size_t r = 0; r < args.rows; ++r) {
    const uint8_t* row = static_cast<const uint8_t*>(args.w) + r * args.w_stride;
    for (size_t t = 0; t < args.tokens; ++t) {
      const uint8_t* x = static_cast<const uint8_t*>(args.x) + t * args.x_stride;
      args.y[t * args.y_stride + r] = dot16<F>(row, reinterpret_cast<const float*>(x), args.cols);
    }
  }
}

template <class F, Format kFormat>
void set(KernelTable* table) {
  constexpr size_t kBlock = format_info(kFormat).block;
  table->linear[static_cast<int>(kFormat)] = linear<F, kBlock>;
  table->dequantise[static_cast<int>(kFormat)] = dequantise<F, kBlock>;
}

template <class F>
void set_float(KernelTable* table, Format format) {
  table->linear[static_cast<int>(format)] = linear_float<F>;
  table->dequantise[static_cast<int>(format)] = widen<F>;
}

}  // namespace

void scalar_linear(KernelTable* table) {
  table->linear_rows = 16;
  set_float<F32>(table, Format::F32);
  set_float<F16>(table, Format::F16);
  set_float<BF16>(table, Format::BF16);
  set<Q4_0, Format::Q4_0>(table);
  set<Q4_1, Format::Q4_1>(table);
  set<Q5_0, Format::Q5_0>(table);
  set<Q5_1, Format::Q5_1>(table);
  set<Q8_0, Format::Q8_0>(table);
  set<IQ4_NL, Format::IQ4_NL>(table);
  set<Q2_K, Format::Q2_K>(table);
  set<Q3_K, Format::Q3_K>(table);
  set<Q4_K, Format::Q4_K>(table);
  set<Q5_K, Format::Q5_K>(table);
  set<Q6_K, Format::Q6_K>(table);
  set<IQ4_XS, Format::IQ4_XS>(table);
  set<IQ2_XXS, Format::IQ2_XXS>(table);
  set<IQ2_XS, Format::IQ2_XS>(table);
  set<IQ2_S, Format::IQ2_S>(table);
  set<IQ3_XXS, Format::IQ3_XXS>(table);
  set<IQ3_S, Format::IQ3_S>(table);
  set<IQ1_S, Format::IQ1_S>(table);
  set<IQ1_M, Format::IQ1_M>(table);
  set<TQ1_0, Format::TQ1_0>(table);
  set<TQ2_0, Format::TQ2_0>(table);
  set<MXFP4, Format::MXFP4>(table);
  table->quantise_act[static_cast<int>(Act::F32)] = copy_act;
  table->quantise_act[static_cast<int>(Act::Q32)] = quantise_act<32>;
  table->quantise_act[static_cast<int>(Act::Q256)] = quantise_act<256>;
}

}  // namespace pe
