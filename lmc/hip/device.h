// Device code on AMD: clang's builtins alone, so that neither HIP's headers nor ROCm's device
// libraries are needed.
#pragma once
#include "lmc/kernels/platform.h"

#define LMC_DEVICE __attribute__((device, always_inline)) inline
#define LMC_KERNEL \
    extern "C" __attribute__((global, amdgpu_flat_work_group_size(LMC_BLOCK, LMC_BLOCK))) void

typedef lmc_u32 lmc_b16 __attribute__((vector_size(16)));

// Memory of the device or mapped into it. Without these words an address that was read from memory
// is "flat" to clang, and every access through it is slower.
template <class Word>
using lmc_global = __attribute__((address_space(1))) Word;

LMC_DEVICE lmc_u32 lmc_thread() { return __builtin_amdgcn_workitem_id_x(); }
LMC_DEVICE lmc_u32 lmc_block() { return __builtin_amdgcn_workgroup_id_x(); }

template <class Word>
LMC_DEVICE Word lmc_load(const Word* p) {
    return *(const lmc_global<Word>*)(lmc_u64)p;
}

// The engine reads its pool again, so that stays in the caches; a chunk passes once.
template <class Word>
LMC_DEVICE Word lmc_load_pool(const Word* p) {
    return *(const lmc_global<Word>*)(lmc_u64)p;
}
template <class Word>
LMC_DEVICE void lmc_store_pool(Word* p, Word word) {
    *(lmc_global<Word>*)(lmc_u64)p = word;
}
template <class Word>
LMC_DEVICE Word lmc_load_chunk(const Word* p) {
    return __builtin_nontemporal_load((const lmc_global<Word>*)(lmc_u64)p);
}
template <class Word>
LMC_DEVICE void lmc_store_chunk(Word* p, Word word) {
    __builtin_nontemporal_store(word, (lmc_global<Word>*)(lmc_u64)p);
}
