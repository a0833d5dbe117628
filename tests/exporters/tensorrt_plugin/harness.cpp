// Does with the plugin what TensorRT would, step by step, and prints what comes of it.
//
//     harness LIBRARY CASE
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace {

class Log final : public ILogger {
public:
    void log(Severity severity, AsciiChar const* text) noexcept override {
        std::printf("said %d: %s\n", static_cast<int>(severity), text);
    }
};

class Finder final : public ILoggerFinder {
public:
    ILogger* findLogger() override { return &mLog; }

private:
    Log mLog;
};

template <class Function>
Function symbol(void* library, char const* name) {
    return reinterpret_cast<Function>(dlsym(library, name));
}

template <class Capability>
Capability* as(IPluginV3* plugin, PluginCapabilityType type) {
    return static_cast<Capability*>(plugin->getCapabilityInterface(type));
}

constexpr int32_t kCount = 6;
constexpr DataType kTypes[kCount + 1] = {DataType::kBF16,  DataType::kBF16, DataType::kFP8,
                                         DataType::kFLOAT, DataType::kFP8,  DataType::kFLOAT,
                                         DataType::kBF16};

std::vector<DynamicPluginTensorDesc> layer(int64_t tokens, int64_t dim, int64_t hidden,
                                           int64_t experts, int64_t most) {
    Dims const dims[kCount + 1] = {{2, {tokens, dim}},
                                   {2, {experts, dim}},
                                   {3, {experts + 1, 2 * hidden, dim}},
                                   {2, {experts + 1, 2 * hidden}},
                                   {3, {experts + 1, dim, hidden}},
                                   {2, {experts + 1, dim}},
                                   {2, {tokens, dim}}};
    std::vector<DynamicPluginTensorDesc> found(kCount + 1);
    for (int32_t i = 0; i <= kCount; ++i) {
        found[i].desc = {dims[i], kTypes[i], TensorFormat::kLINEAR, 1.F};
        found[i].max = dims[i];
    }
    found[0].max.d[0] = found[kCount].max.d[0] = most;
    return found;
}

std::vector<PluginTensorDesc> fixed(std::vector<DynamicPluginTensorDesc> const& from) {
    std::vector<PluginTensorDesc> found;
    for (auto const& each : from) found.push_back(each.desc);
    return found;
}

}  // namespace

int main(int, char** arguments) {
    void* const library = dlopen(arguments[1], RTLD_NOW);
    if (!library) return std::printf("%s\n", dlerror()), 1;
    std::string const wanted = arguments[2];
    Finder finder;
    if (wanted != "stderr")
        symbol<void (*)(ILoggerFinder*)>(library, "setLoggerFinder")(&finder);
    int32_t count = 0;
    auto* const creators =
        symbol<IPluginCreatorInterface* const* (*)(int32_t&)>(library, "getCreators")(count);
    auto* const creator = static_cast<IPluginCreatorV3One*>(creators[0]);
    std::printf("creators %d %s %s %s %s fields %d\n", count, creator->getInterfaceInfo().kind,
                creator->getPluginName(), creator->getPluginVersion(),
                creator->getPluginNamespace(), creator->getFieldNames()->nbFields);
    PluginFieldCollection const none{};

    // Where the engine is built: T is not known, and there may be no GPU.
    std::unique_ptr<IPluginV3> made(creator->createPlugin("moe", &none, TensorRTPhase::kBUILD));
    auto* const core = as<IPluginV3OneCore>(made.get(), PluginCapabilityType::kCORE);
    auto* const build = as<IPluginV3OneBuild>(made.get(), PluginCapabilityType::kBUILD);
    std::printf("core %s %s %s outputs %d\n", core->getPluginName(), core->getPluginVersion(),
                core->getPluginNamespace(), build->getNbOutputs());
    auto all = layer(-1, 256, 128, 20, 600);
    if (wanted == "sizes") all = layer(-1, 256, 128, 21, 600);
    if (wanted == "shape") all[5].desc.dims.d[1] = 255;
    if (wanted == "rank") all[4].desc.dims.nbDims = 2;
    DataType types[kCount + 1];
    std::memcpy(types, kTypes, sizeof types);
    if (wanted == "dtype" || wanted == "stderr") types[2] = DataType::kINT8;
    DataType out{};
    std::printf("types %d", build->getOutputDataTypes(&out, 1, types, kCount));
    std::printf(" -> %d\n", static_cast<int>(out));
    int supported = 0, others = 0;
    for (int32_t i = 0; i <= kCount; ++i) {
        auto different = all;
        supported += build->supportsFormatCombination(i, all.data(), kCount, 1);
        different[i].desc.type = DataType::kHALF;
        others += build->supportsFormatCombination(i, different.data(), kCount, 1);
        different = all;
        different[i].desc.format = static_cast<TensorFormat>(1);
        others += build->supportsFormatCombination(i, different.data(), kCount, 1);
    }
    std::printf("supported %d others %d\n", supported, others);
    int32_t const inputs = wanted == "count" ? 5 : kCount;
    std::printf("configured %d\n",
                build->configurePlugin(all.data(), inputs, all.data() + kCount, 1));
    std::printf("workspace %zu\n",
                build->getWorkspaceSize(all.data(), kCount, all.data() + kCount, 1));
    auto* const runtime = as<IPluginV3OneRuntime>(made.get(), PluginCapabilityType::kRUNTIME);
    auto const twenty = fixed(layer(20, 256, 128, 20, 600));
    std::printf("build shapes %d\n",
                runtime->onShapeChange(twenty.data(), kCount, twenty.data() + kCount, 1));

    // What the engine keeps, and where it is read again.
    PluginFieldCollection kept = *runtime->getFieldsToSerialize();
    std::vector<PluginField> fields(kept.fields, kept.fields + kept.nbFields);
    for (auto const& each : fields)
        if (each.type == PluginFieldType::kINT64)
            std::printf("field %s %lld\n", each.name, *static_cast<long long const*>(each.data));
        else
            std::printf("field %s %.*s\n", each.name, each.length,
                        static_cast<char const*>(each.data));
    std::string const other(64, 'a');
    for (auto& each : fields) {
        if (wanted == "sha" && !std::strcmp(each.name, "sha256")) each.data = other.data();
    }
    kept = {static_cast<int32_t>(fields.size()), fields.data()};
    if (wanted == "no fields") kept = none;
    std::unique_ptr<IPluginV3> read(creator->createPlugin("moe", &kept, TensorRTPhase::kRUNTIME));
    std::printf("read %d\n", read != nullptr);
    if (!read) return 0;

    // Where it runs.
    auto* const first = as<IPluginV3OneRuntime>(read.get(), PluginCapabilityType::kRUNTIME);
    std::unique_ptr<IPluginV3> const attached(first->attachToContext(nullptr));
    auto* const run = as<IPluginV3OneRuntime>(attached.get(), PluginCapabilityType::kRUNTIME);
    auto now = fixed(layer(20, wanted == "changed" ? 64 : 256, wanted == "changed" ? 64 : 128,
                           wanted == "changed" ? 2 : 20, 600));
    std::printf("shapes %d\n", run->onShapeChange(now.data(), kCount, now.data() + kCount, 1));
    auto fake = symbol<void (*)(int, int const*)>(RTLD_DEFAULT, "fake_expect");
    for (int i = 0; fake && i < 5; ++i) fake(0, nullptr);
    void const* given[kCount];
    for (int32_t i = 0; i < kCount; ++i)
        given[i] = reinterpret_cast<void*>(0x100000UL * (i + 1));
    void* taken[1] = {reinterpret_cast<void*>(0x900000UL)};
    auto const stream = reinterpret_cast<cudaStream_t>(0x570UL);
    std::printf("ran %d\n", run->enqueue(now.data(), now.data() + kCount, given, taken,
                                         reinterpret_cast<void*>(0xa00000UL), stream));
}
