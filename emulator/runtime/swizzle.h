// The swizzles of TMA and of wgmma's descriptors, which are the same.
#pragma once
#include <cstdint>

namespace emu {

// A swizzle over 16 << mode bytes (0: none, 1: 32, 2: 64, 3: 128): the number of a 16-byte chunk within these bytes is
// XORed with the number of the 128-byte line.
inline uint32_t swizzled(uint32_t address, int mode) { return address ^ (address >> 7 & ((1u << mode) - 1)) << 4; }

}  // namespace emu
