// A vendor's device code, its device.h included, as plain C++ for this machine: a thread is a call.
// Threads of all blocks run in a seeded shuffled order, since nothing may depend on it. Built with
// -DSOURCE and -DCUDA or -DHIP.
#include <algorithm>
#include <cstddef>
#include <random>
#include <utility>
#include <vector>

#ifndef HOST_CHUNK
#    define HOST_CHUNK(p) (p)  // a word of a chunk, where this process has it
#endif

static thread_local struct {
    unsigned x;
} threadIdx, blockIdx;

#if defined(CUDA)
#    define __device__
#    define __global__
#    define __forceinline__ inline
#    define __launch_bounds__(threads)
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
template <class Word>
Word __ldg(const Word* p) {
    return *p;
}
template <class Word>
Word __ldcg(const Word* p) {
    return *p;
}
template <class Word>
Word __ldcs(const Word* p) {
    return *HOST_CHUNK(p);
}
template <class Word>
void __stcg(Word* p, Word word) {
    *p = word;
}
template <class Word>
void __stcs(Word* p, Word word) {
    *HOST_CHUNK(p) = word;
}
#elif defined(HIP)
#    define __builtin_amdgcn_workitem_id_x() threadIdx.x
#    define __builtin_amdgcn_workgroup_id_x() blockIdx.x
#    define __builtin_nontemporal_load(p) (*HOST_CHUNK(p))
#    define __builtin_nontemporal_store(word, p) (*HOST_CHUNK(p) = (word))
#endif

#include SOURCE

extern "C" size_t host_args_bytes() { return sizeof(lmc_pages); }
extern "C" unsigned host_block_threads() { return LMC_BLOCK; }

extern "C" void host_launch(bool gather, const lmc_pages* args, unsigned seed) {
    std::vector<std::pair<unsigned, unsigned>> threads;
    for (unsigned block = 0; block < args->grid; ++block)
        for (unsigned thread = 0; thread < LMC_BLOCK; ++thread) threads.emplace_back(block, thread);
    std::shuffle(threads.begin(), threads.end(), std::mt19937(seed));
    for (const auto& [block, thread] : threads) {
        blockIdx.x = block;
        threadIdx.x = thread;
        gather ? lmc_gather(*args) : lmc_scatter(*args);
    }
}
