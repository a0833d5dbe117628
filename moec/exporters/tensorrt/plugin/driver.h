// NVIDIA's driver, opened when it is needed: so that the library loads where there is none.
#pragma once

#include <cuda.h>

#define MOEC_DRIVER(EACH)        \
    EACH(cuGetErrorString)       \
    EACH(cuCtxGetCurrent)        \
    EACH(cuCtxGetId)             \
    EACH(cuCtxGetDevice)         \
    EACH(cuDeviceGetAttribute)   \
    EACH(cuModuleLoadData)       \
    EACH(cuModuleGetFunction)    \
    EACH(cuFuncSetAttribute)     \
    EACH(cuFuncSetCacheConfig)   \
    EACH(cuTensorMapEncodeTiled) \
    EACH(cuLaunchKernelEx)

namespace moec {

struct Driver {
#define MOEC_MEMBER(NAME) decltype(&::NAME) NAME;
    MOEC_DRIVER(MOEC_MEMBER)
#undef MOEC_MEMBER

    /// Throws Failure, with `what` was tried and the driver's own words, unless it went well.
    void check(CUresult result, char const* what) const;
};

/// Throws Failure where there is no driver, or one that is too old.
Driver const& driver();

}  // namespace moec
