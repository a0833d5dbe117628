// NVIDIA's driver. It is opened at its first use, so that a library also loads without one.
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
    EACH(cuMemcpyDtoDAsync)      \
    EACH(cuLaunchKernelEx)

namespace moec {

struct Driver {
#define MOEC_MEMBER(NAME) decltype(&::NAME) NAME;
    MOEC_DRIVER(MOEC_MEMBER)
#undef MOEC_MEMBER

    /// Throws Failure if `result` is an error, with the call `what` and the driver's message.
    void check(CUresult result, char const* what) const;
};

/// The opened driver. Throws Failure if there is none, or if it is too old.
Driver const& driver();

}  // namespace moec
