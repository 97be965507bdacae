// The namespace of our operators. Each operator's own file adds its schema and kernels with
// STABLE_TORCH_LIBRARY_FRAGMENT and STABLE_TORCH_LIBRARY_IMPL.
#include "checks.h"

STABLE_TORCH_LIBRARY(avppc, library) { (void)library; }
