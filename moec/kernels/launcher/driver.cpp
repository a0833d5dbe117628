// See driver.h.
#include "driver.h"

#include <dlfcn.h>

#include "program.h"

namespace moec {

namespace {

void* find(void* library, char const* name) {
    void* const found = dlsym(library, name);
    if (!found)
        throw refusal("NVIDIA's driver", std::string("no ") + name, "a driver for CUDA 12 or newer",
                      "update the driver");
    return found;
}

Driver opened() {
    void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library)
        throw refusal("NVIDIA's driver", dlerror(), "libcuda.so.1", "run where there is a GPU");
    Driver found;
// cuda.h may define a name as a macro for a newer one. The name is made a string after that.
#define MOEC_TEXT(NAME) #NAME
#define MOEC_FIND(NAME) \
    found.NAME = reinterpret_cast<decltype(&::NAME)>(find(library, MOEC_TEXT(NAME)));
    MOEC_DRIVER(MOEC_FIND)
#undef MOEC_FIND
#undef MOEC_TEXT
    return found;
}

}  // namespace

void Driver::check(CUresult result, char const* what) const {
    if (result == CUDA_SUCCESS) return;
    char const* text = nullptr;
    cuGetErrorString(result, &text);
    throw Failure(std::string(what) + ": CUDA error " + std::to_string(result) + ", " +
                  (text ? text : "unknown"));
}

Driver const& driver() {
    static Driver const found = opened();  // if opened() throws, the next call tries again
    return found;
}

}  // namespace moec
