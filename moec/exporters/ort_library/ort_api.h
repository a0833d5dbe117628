// What the library uses of ONNX Runtime's C API, declared anew.
//
// The API is a table of functions that only ever grows at its end, so that a function keeps its
// place, and so do the members of OrtCustomOp. check_api.cpp compares both with
// onnxruntime_c_api.h, where a user has that header.
#pragma once

#include <cstddef>
#include <cstdint>

#ifndef ORT_API_VERSION  // the header itself is not included

extern "C" {

struct OrtStatus;
struct OrtValue;
struct OrtMemoryInfo;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtTensorTypeAndShapeInfo;
struct OrtAllocator;

/// The table: its functions have different types, so that each is called through its own below.
struct OrtApi {
    void (*functions[254])();
};

struct OrtApiBase {
    OrtApi const* (*GetApi)(uint32_t version);
    char const* (*GetVersionString)();
};

struct OrtCustomOp {
    uint32_t version;
    void* (*CreateKernel)(OrtCustomOp const*, OrtApi const*, OrtKernelInfo const*);
    char const* (*GetName)(OrtCustomOp const*);
    char const* (*GetExecutionProviderType)(OrtCustomOp const*);
    int (*GetInputType)(OrtCustomOp const*, std::size_t);
    std::size_t (*GetInputTypeCount)(OrtCustomOp const*);
    int (*GetOutputType)(OrtCustomOp const*, std::size_t);
    std::size_t (*GetOutputTypeCount)(OrtCustomOp const*);
    void (*KernelCompute)(void*, OrtKernelContext*);
    void (*KernelDestroy)(void*);
    int (*GetInputCharacteristic)(OrtCustomOp const*, std::size_t);
    int (*GetOutputCharacteristic)(OrtCustomOp const*, std::size_t);
    int (*GetInputMemoryType)(OrtCustomOp const*, std::size_t);
    int (*GetVariadicInputMinArity)(OrtCustomOp const*);
    int (*GetVariadicInputHomogeneity)(OrtCustomOp const*);
    int (*GetVariadicOutputMinArity)(OrtCustomOp const*);
    int (*GetVariadicOutputHomogeneity)(OrtCustomOp const*);
    OrtStatus* (*CreateKernelV2)(OrtCustomOp const*, OrtApi const*, OrtKernelInfo const*, void**);
    OrtStatus* (*KernelComputeV2)(void*, OrtKernelContext*);
    OrtStatus* (*InferOutputShapeFn)(OrtCustomOp const*, void*);
    int (*GetStartVersion)(OrtCustomOp const*);
    int (*GetEndVersion)(OrtCustomOp const*);
    std::size_t (*GetMayInplace)(int**, int**);
    void (*ReleaseMayInplace)(int*, int*);
    std::size_t (*GetAliasMap)(int**, int**);
    void (*ReleaseAliasMap)(int*, int*);
};

}  // extern "C"

#endif

namespace ort {

/// The version of the API that has all of this.
constexpr uint32_t kVersion = 18;
enum Characteristic : int { kRequired = 0, kOptional = 1 };
constexpr int kOnDevice = 0;         // OrtMemTypeDefault
constexpr int kInvalidArgument = 2;  // ORT_INVALID_ARGUMENT

// name in the API, place in the table, result, parameters
#define MOEC_ORT_API(EACH)                                                                        \
    EACH(CreateStatus, 0, OrtStatus*, (int, char const*))                                         \
    EACH(GetErrorMessage, 2, char const*, (OrtStatus const*))                                     \
    EACH(CreateCustomOpDomain, 26, OrtStatus*, (char const*, OrtCustomOpDomain**))                \
    EACH(CustomOpDomain_Add, 27, OrtStatus*, (OrtCustomOpDomain*, OrtCustomOp const*))            \
    EACH(AddCustomOpDomain, 28, OrtStatus*, (OrtSessionOptions*, OrtCustomOpDomain*))             \
    EACH(GetTensorMutableData, 51, OrtStatus*, (OrtValue*, void**))                               \
    EACH(GetDimensionsCount, 61, OrtStatus*, (OrtTensorTypeAndShapeInfo const*, std::size_t*))    \
    EACH(GetDimensions, 62, OrtStatus*,                                                           \
         (OrtTensorTypeAndShapeInfo const*, int64_t*, std::size_t))                               \
    EACH(GetTensorTypeAndShape, 65, OrtStatus*, (OrtValue const*, OrtTensorTypeAndShapeInfo**))   \
    EACH(KernelInfoGetAttribute_string, 87, OrtStatus*,                                           \
         (OrtKernelInfo const*, char const*, char*, std::size_t*))                                \
    EACH(KernelContext_GetInput, 90, OrtStatus*,                                                  \
         (OrtKernelContext const*, std::size_t, OrtValue const**))                                \
    EACH(KernelContext_GetOutput, 91, OrtStatus*,                                                 \
         (OrtKernelContext*, std::size_t, int64_t const*, std::size_t, OrtValue**))               \
    EACH(AllocatorAlloc, 75, OrtStatus*, (OrtAllocator*, std::size_t, void**))                    \
    EACH(AllocatorFree, 76, OrtStatus*, (OrtAllocator*, void*))                                   \
    EACH(ReleaseStatus, 93, void, (OrtStatus*))                                                   \
    EACH(ReleaseTensorTypeAndShapeInfo, 99, void, (OrtTensorTypeAndShapeInfo*))                   \
    EACH(KernelContext_GetGPUComputeStream, 193, OrtStatus*, (OrtKernelContext const*, void**))   \
    EACH(GetTensorMemoryInfo, 194, OrtStatus*, (OrtValue const*, OrtMemoryInfo const**))          \
    EACH(ReleaseAllocator, 132, void, (OrtAllocator*))                                            \
    EACH(KernelContext_GetAllocator, 253, OrtStatus*,                                             \
         (OrtKernelContext const*, OrtMemoryInfo const*, OrtAllocator**))

#ifndef ORT_API_VERSION

/// Each function of the API, called as `GetDimensions(api, ...)`.
#define MOEC_ORT_FUNCTION(NAME, PLACE, RESULT, PARAMETERS)                                        \
    template <class... Given>                                                                     \
    RESULT NAME(OrtApi const* api, Given... given) {                                              \
        return reinterpret_cast<RESULT(*) PARAMETERS>(api->functions[PLACE])(given...);           \
    }
MOEC_ORT_API(MOEC_ORT_FUNCTION)
#undef MOEC_ORT_FUNCTION

#endif

}  // namespace ort
