// Device code on NVIDIA: nvcc's dialect, which NVRTC knows without any header.
#pragma once
#include "lmc/kernels/platform.h"

#define LMC_DEVICE __device__ __forceinline__
#define LMC_KERNEL extern "C" __global__ void __launch_bounds__(LMC_BLOCK)

typedef uint4 lmc_b16;

LMC_DEVICE lmc_u32 lmc_thread() { return threadIdx.x; }
LMC_DEVICE lmc_u32 lmc_block() { return blockIdx.x; }

template <class Word>
LMC_DEVICE Word lmc_load(const Word* p) {
    return __ldg(p);
}

// The engine reads its pool again, so that stays in L2; a chunk passes once and leaves L2 first.
template <class Word>
LMC_DEVICE Word lmc_load_pool(const Word* p) {
    return __ldcg(p);
}
template <class Word>
LMC_DEVICE void lmc_store_pool(Word* p, Word word) {
    __stcg(p, word);
}
template <class Word>
LMC_DEVICE Word lmc_load_chunk(const Word* p) {
    return __ldcs(p);
}
template <class Word>
LMC_DEVICE void lmc_store_chunk(Word* p, Word word) {
    __stcs(p, word);
}
