// How large the parts of a GGUF file may be. Real files stay far below; beyond is damage or an attack.
#pragma once

#include <cstdint>

namespace pe::gguf {

inline constexpr uint64_t kMaxKeys = 65536;
inline constexpr uint64_t kMaxTensors = 65536;
inline constexpr uint64_t kMaxKeyBytes = 65535;
inline constexpr uint64_t kMaxTensorNameBytes = 64;  // the format's own limit
inline constexpr uint64_t kMaxStringBytes = 16ull << 20;
inline constexpr uint64_t kMaxArrayLength = 4194304;
inline constexpr uint64_t kMaxHeaderBytes = 256ull << 20;  // metadata and tensor table
inline constexpr uint32_t kMaxDims = 4;
inline constexpr uint64_t kMaxDim = 1ull << 40;
inline constexpr uint32_t kMinAlignment = 8;  // the format asks for a multiple of 8
inline constexpr uint32_t kMaxAlignment = 1u << 20;
inline constexpr uint32_t kDefaultAlignment = 32;
inline constexpr uint32_t kMaxParts = 1000;

// Of models, for the architecture schemas.
inline constexpr uint32_t kMaxLayers = 512;
inline constexpr uint32_t kMaxContext = 1u << 24;
inline constexpr uint32_t kMaxVocabulary = 1048576;

}  // namespace pe::gguf
