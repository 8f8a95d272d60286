// What device code is written in. A vendor's device.h includes this and gives:
//   LMC_DEVICE, LMC_KERNEL                what stands before an inlined function and an entry point
//   lmc_thread(), lmc_block()             the thread in its block, the block in the grid
//   lmc_b16                               16 bytes that move at once
//   lmc_load(p)                           a word of a table
//   lmc_load_pool(p),  lmc_store_pool(p, word)    a word of the engine's pool
//   lmc_load_chunk(p), lmc_store_chunk(p, word)   a word of a chunk
// Words are lmc_b16, lmc_u64, lmc_u32 and lmc_u8, aligned to their size. The types are our own since
// NVRTC has no <stdint.h>.
#pragma once

typedef unsigned char lmc_u8;
typedef unsigned int lmc_u32;
typedef unsigned long long lmc_u64;
typedef long long lmc_i64;

enum : lmc_u32 {
    LMC_BLOCK = 256,  // threads; the grid is in the arguments, so AMD's objects need no hidden ones
    LMC_UNROLL = 4,   // words a thread has in flight
};
