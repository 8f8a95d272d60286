// Entry points of the page ops on NVIDIA.
#include "lmc/cuda/device.h"
#include "lmc/kernels/pages.h"

LMC_KERNEL lmc_gather(lmc_pages a) { lmc_move<true>(a); }
LMC_KERNEL lmc_scatter(lmc_pages a) { lmc_move<false>(a); }
