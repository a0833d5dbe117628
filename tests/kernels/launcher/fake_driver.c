/* A libcuda.so.1 that runs nothing and writes down what it is asked for, a line of JSON each.
   FAKE_LOG: where to; FAKE_CC, FAKE_SMS: the GPU; FAKE_CONTEXT=0: no context. */
#include <cuda.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void say(const char *format, ...) {
    FILE *log = fopen(getenv("FAKE_LOG"), "a");
    va_list values;
    va_start(values, format);
    vfprintf(log, format, values);
    va_end(values);
    fclose(log);
}

static int number(const char *name, int otherwise) {
    const char *text = getenv(name);
    return text ? atoi(text) : otherwise;
}

/* Bytes of the parameters of launches to come: a count, then as many. */
static int expected[1 << 16], expected_end, expected_at;

void fake_expect(int count, const int *sizes) {
    expected[expected_end++] = count;
    for (int i = 0; i < count; ++i) expected[expected_end++] = sizes[i];
}

struct function {
    const void *image;
    char name[64];
    int shared;
};

CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = error == CUDA_ERROR_NOT_FOUND ? "not found" : "an error";
    return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *context) {
    *context = (CUcontext)(size_t)number("FAKE_CONTEXT", 1);
    return CUDA_SUCCESS;
}
CUresult cuCtxGetId(CUcontext context, unsigned long long *id) {
    *id = (size_t)context;
    return CUDA_SUCCESS;
}
CUresult cuCtxGetDevice(CUdevice *device) {
    *device = 0;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice device) {
    (void)device;
    int architecture = number("FAKE_CC", 90);
    if (which == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)
        *value = architecture / 10;
    else if (which == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)
        *value = architecture % 10;
    else if (which == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
        *value = number("FAKE_SMS", 132);
    else
        return CUDA_ERROR_INVALID_VALUE;
    return CUDA_SUCCESS;
}
CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    if (memcmp(image, "\177ELF", 4)) return CUDA_ERROR_INVALID_IMAGE;
    *module = (CUmodule)image;
    say("{\"load\": %zu}\n", (size_t)image);
    return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    struct function *made = calloc(1, sizeof *made);
    made->image = module;
    strncpy(made->name, name, sizeof made->name - 1);
    *function = (CUfunction)made;
    return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute which, int value) {
    if (which != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_ERROR_INVALID_VALUE;
    ((struct function *)function)->shared = value;
    return CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) {
    int asked = ((struct function *)function)->shared;
    return asked && config == CU_FUNC_CACHE_PREFER_SHARED ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuTensorMapEncodeTiled(
    CUtensorMap *map, CUtensorMapDataType element, cuuint32_t rank, void *address,
    const cuuint64_t *extents, const cuuint64_t *strides, const cuuint32_t *tile,
    const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
    CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
    static unsigned long long made = 0;
    memset(map, 255, sizeof *map);
    memcpy(map, &made, sizeof made);
    say("{\"map\": %llu, \"at\": %zu, \"aligned\": %d, \"element\": %d, \"rank\": %u, "
        "\"extents\": [%llu, %llu], \"stride\": %llu, \"tile\": [%u, %u], \"steps\": [%u, %u], "
        "\"interleave\": %d, \"swizzle\": %d, \"promotion\": %d, \"fill\": %d}\n",
        made++, (size_t)address, (size_t)map % 64 == 0, element, rank,
        (unsigned long long)extents[0], (unsigned long long)extents[1],
        (unsigned long long)strides[0], tile[0], tile[1], steps[0], steps[1], interleave, swizzle,
        promotion, fill);
    return CUDA_SUCCESS;
}
CUresult cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
    say("{\"copy\": %zu, \"from\": %zu, \"bytes\": %zu, \"stream\": %zu}\n", (size_t)to, (size_t)from,
        bytes, (size_t)stream);
    return CUDA_SUCCESS;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters,
                          void **extra) {
    struct function *of = (struct function *)function;
    int count = expected[expected_at++];
    if (extra) return CUDA_ERROR_INVALID_VALUE;
    say("{\"launch\": \"%s\", \"image\": %zu, \"grid\": [%u, %u, %u], \"block\": [%u, %u, %u], "
        "\"shared\": %u, \"asked\": %d, \"stream\": %zu, \"attributes\": [",
        of->name, (size_t)of->image, config->gridDimX, config->gridDimY, config->gridDimZ,
        config->blockDimX, config->blockDimY, config->blockDimZ, config->sharedMemBytes, of->shared,
        (size_t)config->hStream);
    for (unsigned i = 0; i < config->numAttrs; ++i)
        say("%s[%d, %d]", i ? ", " : "", config->attrs[i].id,
            config->attrs[i].value.programmaticStreamSerializationAllowed);
    say("], \"parameters\": [");
    for (int i = 0; i < count; ++i) {
        unsigned long long value = 0;
        memcpy(&value, parameters[i], expected[expected_at++]);
        say("%s%llu", i ? ", " : "", value);
    }
    say("]}\n");
    return CUDA_SUCCESS;
}
