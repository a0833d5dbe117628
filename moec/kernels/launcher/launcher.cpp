// See launcher.h.
#include "launcher.h"

#include <algorithm>
#include <array>

#include "driver.h"

namespace moec {

namespace {

/// The shared memory in bytes that a kernel may use without a function attribute.
constexpr int64_t kSharedByDefault = 48 * 1024;

/// The calling thread's CUDA context, by an id that is never reused, and its GPU.
struct Here {
    unsigned long long context{};
    int64_t architecture{}, multiprocessors{};

    Here() {
        Driver const& cuda = driver();
        CUcontext current = nullptr;
        cuda.check(cuda.cuCtxGetCurrent(&current), "cuCtxGetCurrent");
        if (!current)
            throw refusal("this thread", "no CUDA context", "a current CUDA context",
                          "select a device before running the layer");
        cuda.check(cuda.cuCtxGetId(current, &context), "cuCtxGetId");
        CUdevice device = 0;
        cuda.check(cuda.cuCtxGetDevice(&device), "cuCtxGetDevice");
        auto attribute = [&](CUdevice_attribute which) {
            int found = 0;
            cuda.check(cuda.cuDeviceGetAttribute(&found, which, device), "cuDeviceGetAttribute");
            return static_cast<int64_t>(found);
        };
        architecture = 10 * attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) +
                       attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
        multiprocessors = attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
    }
};

/// The values of a kernel's parameters, and a pointer to each for the driver.
class Parameters {
public:
    Parameters(Launch const& launch, std::vector<CUdeviceptr> const& slots, Values const& values) {
        std::size_t const count = launch.parameters.size();
        // The last two stay null. They stand for Triton's scratch memory, which no kernel uses.
        mWords.resize(count + 2);
        mMaps.resize(count);
        for (std::size_t i = 0; i < count; ++i) {
            Parameter const& each = launch.parameters[i];
            if (each.kind == Parameter::kMap) {
                encode(each, slots[each.slot], values, mMaps[i]);
                pointers.push_back(&mMaps[i]);
                continue;
            }
            mWords[i] = each.kind == Parameter::kNumber ? each.value.at(values)
                        : each.slot < 0                 ? 0
                                                        : static_cast<int64_t>(slots[each.slot]);
            pointers.push_back(&mWords[i]);  // little-endian: a narrower number is the first bytes
        }
        pointers.push_back(&mWords[count]);
        pointers.push_back(&mWords[count + 1]);
    }

    std::vector<void*> pointers;

private:
    static void encode(Parameter const& each, CUdeviceptr matrix, Values const& values,
                       CUtensorMap& into) {
        // The driver wants the innermost dimension first, and no stride for it.
        std::array<cuuint64_t, 2> const extents{static_cast<cuuint64_t>(each.columns),
                                                static_cast<cuuint64_t>(each.value.at(values))};
        cuuint64_t const stride = static_cast<cuuint64_t>(each.columns * each.elementBytes);
        std::array<cuuint32_t, 2> const tile{static_cast<cuuint32_t>(each.tileColumns),
                                             static_cast<cuuint32_t>(each.tileRows)};
        std::array<cuuint32_t, 2> const steps{1, 1};
        Driver const& cuda = driver();
        cuda.check(cuda.cuTensorMapEncodeTiled(
                       &into, static_cast<CUtensorMapDataType>(each.element), 2,
                       reinterpret_cast<void*>(matrix), extents.data(), &stride, tile.data(),
                       steps.data(), CU_TENSOR_MAP_INTERLEAVE_NONE,
                       static_cast<CUtensorMapSwizzle>(each.swizzle),
                       CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
                   "cuTensorMapEncodeTiled");
    }

    std::vector<int64_t> mWords;
    std::vector<CUtensorMap> mMaps;  // CUtensorMap is aligned to 64 bytes, as the driver requires
};

/// Kernels and tensor maps read 16 bytes at once, so that every pointer must be aligned to 16.
void checkPointer(std::string const& name, CUdeviceptr pointer) {
    if (!pointer || pointer % 16)
        throw refusal(name, pointer ? "a pointer that is not aligned" : "a null pointer",
                      "a pointer aligned to 16 bytes", "allocate memory for it");
}

}  // namespace

CUfunction Launcher::function(unsigned long long context, int64_t kernel) {
    std::lock_guard<std::mutex> const lock(mMutex);
    auto const found = mLoaded.find({context, kernel});
    if (found != mLoaded.end()) return found->second;
    Driver const& cuda = driver();
    Kernel const& each = mProgram.kernels[kernel];
    CUmodule module = nullptr;  // never unloaded, because its context may end before this object
    cuda.check(cuda.cuModuleLoadData(&module, each.cubin), "cuModuleLoadData");
    CUfunction made = nullptr;
    cuda.check(cuda.cuModuleGetFunction(&made, module, each.name.c_str()), "cuModuleGetFunction");
    if (each.shared > kSharedByDefault) {
        constexpr auto kShared = CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        cuda.check(cuda.cuFuncSetAttribute(made, kShared, static_cast<int>(each.shared)),
                   "cuFuncSetAttribute");
        // Triton does this too. With a larger L1 cache fewer blocks would fit at once.
        cuda.check(cuda.cuFuncSetCacheConfig(made, CU_FUNC_CACHE_PREFER_SHARED),
                   "cuFuncSetCacheConfig");
    }
    return mLoaded[{context, kernel}] = made;
}

void Launcher::prepare() {
    Here const here;
    for (Variant const& variant : mProgram.target(here.architecture).variants)
        for (Launch const& launch : variant.launches) function(here.context, launch.kernel);
}

int64_t Launcher::workspace(Values const& values) const {
    return mProgram.workspace(mProgram.target(Here().architecture), values);
}

void Launcher::run(Values const& values, CUdeviceptr const* given, CUdeviceptr workspace,
                   int64_t room, CUstream stream, bool follows) {
    int64_t const tokens = values[kTokens];
    if (tokens < 1) return;
    Here const here;
    Driver const& cuda = driver();
    Target const& target = mProgram.target(here.architecture);
    int64_t const needed = mProgram.workspace(target, values);
    if (room < needed)
        throw refusal("the workspace", std::to_string(room) + " bytes",
                      std::to_string(needed) + " for " + std::to_string(tokens) + " tokens",
                      "give it more");
    if (needed) checkPointer("the workspace", workspace);
    for (std::size_t i = 0; i < mProgram.given.size(); ++i)
        if (mProgram.given[i].role != Given::kLeftOut)
            checkPointer(mProgram.given[i].name, given[i]);
    Values part = values;
    for (int64_t done = 0; done < tokens; done += part[kTokens]) {
        part[kTokens] = mProgram.most ? std::min(mProgram.most, tokens - done) : tokens;
        Variant const& variant = variantFor(target, part);
        std::vector<CUdeviceptr> slots;
        for (std::size_t i = 0; i < mProgram.given.size(); ++i)
            slots.push_back(given[i] + done * mProgram.given[i].rowBytes());
        for (int64_t offset : placed(variant, part)) slots.push_back(workspace + offset);
        for (Launch const& launch : variant.launches) {
            Parameters parameters(launch, slots, part);
            auto axis = [&](int i) {
                int64_t const found = launch.grid[i].at(part);
                return static_cast<unsigned>(found == kEvery ? here.multiprocessors : found);
            };
            Kernel const& kernel = mProgram.kernels[launch.kernel];
            CUlaunchAttribute early{};
            early.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
            early.value.programmaticStreamSerializationAllowed = 1;
            CUlaunchConfig config{};
            config.gridDimX = axis(0);
            config.gridDimY = axis(1);
            config.gridDimZ = axis(2);
            config.blockDimX = static_cast<unsigned>(kernel.threads);
            config.blockDimY = config.blockDimZ = 1;
            config.sharedMemBytes = static_cast<unsigned>(kernel.shared);
            config.hStream = stream;
            config.attrs = &early;
            // A kernel of another library ahead of the first one may not have waited for those
            // before it.
            config.numAttrs = launch.overlap && follows ? 1 : 0;
            follows = true;
            cuda.check(cuda.cuLaunchKernelEx(&config, function(here.context, launch.kernel),
                                             parameters.pointers.data(), nullptr),
                       ("cuLaunchKernelEx " + kernel.name).c_str());
        }
    }
}

}  // namespace moec
