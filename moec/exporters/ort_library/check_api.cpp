// Compares ort_api.h with ONNX Runtime's own header; it is no part of the library.
//
//     g++ -std=c++17 -fsyntax-only -I FOLDER-OF-onnxruntime_c_api.h check_api.cpp
#include <onnxruntime_c_api.h>

#include "ort_api.h"

#define MOEC_PLACE(NAME, PLACE, RESULT, PARAMETERS) \
    static_assert(offsetof(OrtApi, NAME) == (PLACE) * sizeof(void*), #NAME);
MOEC_ORT_API(MOEC_PLACE)

// The version comes first, with room after it; each member is a function.
#define MOEC_MEMBER(NAME, PLACE) \
    static_assert(offsetof(OrtCustomOp, NAME) == (PLACE) * sizeof(void*), #NAME);
MOEC_MEMBER(version, 0)
MOEC_MEMBER(CreateKernel, 1)
MOEC_MEMBER(GetName, 2)
MOEC_MEMBER(GetExecutionProviderType, 3)
MOEC_MEMBER(GetInputType, 4)
MOEC_MEMBER(GetOutputTypeCount, 7)
MOEC_MEMBER(KernelCompute, 8)
MOEC_MEMBER(KernelDestroy, 9)
MOEC_MEMBER(GetInputCharacteristic, 10)
MOEC_MEMBER(GetOutputCharacteristic, 11)
MOEC_MEMBER(GetInputMemoryType, 12)
MOEC_MEMBER(GetVariadicInputMinArity, 13)
MOEC_MEMBER(GetVariadicOutputHomogeneity, 16)
MOEC_MEMBER(CreateKernelV2, 17)
MOEC_MEMBER(KernelComputeV2, 18)
MOEC_MEMBER(InferOutputShapeFn, 19)
MOEC_MEMBER(GetStartVersion, 20)
MOEC_MEMBER(GetEndVersion, 21)
MOEC_MEMBER(GetMayInplace, 22)
MOEC_MEMBER(ReleaseAliasMap, 25)

static_assert(int(ort::kRequired) == int(INPUT_OUTPUT_REQUIRED));
static_assert(int(ort::kOptional) == int(INPUT_OUTPUT_OPTIONAL));
static_assert(ort::kOnDevice == int(OrtMemTypeDefault));
static_assert(ort::kInvalidArgument == int(ORT_INVALID_ARGUMENT));
static_assert(ort::kVersion <= ORT_API_VERSION);
