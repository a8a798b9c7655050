// Shared by the conformance kernels.
#pragma once
#include "ptx.cuh"

struct ConformanceParams {
    const uint32_t* input;
    uint32_t* out;
};
LAYOUT(ConformanceParams, input, out)

__device__ __forceinline__ uint32_t* shared_words() { return reinterpret_cast<uint32_t*>(dyn_smem()); }

// The order in which lanes supply row addresses; no row is at its own lane's number.
__device__ __forceinline__ uint32_t shuffled(uint32_t lane) { return (lane * 5 + 3) % 32; }

// A statement for sm_90a alone.
#ifdef PTX_HOPPER
#define HOPPER(...) __VA_ARGS__
#else
#define HOPPER(...)
#endif
