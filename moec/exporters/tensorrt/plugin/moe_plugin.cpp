// The TensorRT plugin "MoecMoe": one MoE layer, top-1, with a shared expert. It needs no Python.
//
//     x bf16 [T, D], router bf16 [E, D],
//     gate_up FP8 [E + 1, 2F, D], gate_up_scale fp32 [E + 1, 2F],
//     down FP8 [E + 1, D, F], down_scale fp32 [E + 1, D]  ->  bf16 [T, D]
//
// T is the number of tokens, D the model's width, F the width of an expert, E the number of routed
// experts. The shared expert comes last. Only T may be dynamic. The plugin stores the SHA-256 of its
// program in the TensorRT engine. When the engine is read again, the plugin refuses
// any other program.
#include <NvInferRuntime.h>

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <memory>

#include "launcher.h"

using namespace nvinfer1;

extern "C" uint8_t const moec_programs[];
extern "C" uint8_t const moec_programs_end[];

namespace {

constexpr char kName[] = "MoecMoe";
constexpr char kVersion[] = "1";
constexpr char kNamespace[] = "moec";
constexpr int32_t kInputs = 6;
constexpr int32_t kFailed = 1;

struct Tensor {
    char const* name;
    DataType type;
    int32_t rank;
};

/// The inputs in their order, then the output.
constexpr Tensor kTensors[kInputs + 1] = {
    {"x", DataType::kBF16, 2},
    {"router", DataType::kBF16, 2},
    {"gate_up", DataType::kFP8, 3},
    {"gate_up_scale", DataType::kFLOAT, 2},
    {"down", DataType::kFP8, 3},
    {"down_scale", DataType::kFLOAT, 2},
    {"out", DataType::kBF16, 2},
};

// -- messages -------------------------------------------------------------------------------------

std::atomic<ILoggerFinder*> gFinder{nullptr};

/// Without a logger finder, the logger of the first of these libraries that is loaded is used.
constexpr char const* kLibraries[] = {"libnvinfer.so.11", "libtensorrt_rtx.so.1"};

ILogger* logger() {
    if (ILoggerFinder* const finder = gFinder) return finder->findLogger();
    for (char const* name : kLibraries)
        if (void* const library = dlopen(name, RTLD_NOW | RTLD_NOLOAD))
            if (void* const find = dlsym(library, "getLogger"))
                return reinterpret_cast<ILogger* (*)()>(find)();
    return nullptr;
}

/// Writes an error to TensorRT's logger, or to stderr if there is none.
void report(std::string const& text) noexcept {
    if (ILogger* const found = logger())
        found->log(ILogger::Severity::kERROR, text.c_str());
    else
        std::fprintf(stderr, "%s\n", text.c_str());
}

/// Runs `call`. Returns 0, or after an exception reports it and returns TensorRT's failure code.
template <class Call>
int32_t guarded(Call call) noexcept {
    try {
        call();
        return 0;
    } catch (std::exception const& error) {
        report(std::string(kName) + ": " + error.what());
        return kFailed;
    }
}

std::string text(DataType type) {
    switch (type) {
        case DataType::kFLOAT: return "FLOAT";
        case DataType::kHALF: return "FLOAT16";
        case DataType::kBF16: return "BFLOAT16";
        case DataType::kFP8: return "FLOAT8E4M3FN";
        default: return "type " + std::to_string(static_cast<int32_t>(type));
    }
}

std::string text(Dims const& dims) {
    std::string found;
    for (int32_t i = 0; i < dims.nbDims; ++i)
        found += (i ? ", " : "") + (dims.d[i] < 0 ? "T" : std::to_string(dims.d[i]));
    return "[" + found + "]";
}

// -- the programs of this library -----------------------------------------------------------------

using Launchers = std::vector<std::unique_ptr<moec::Launcher>>;

Launchers const& launchers() {
    static Launchers const found = [] {
        Launchers made;
        auto const size = static_cast<std::size_t>(moec_programs_end - moec_programs);
        for (moec::Program& each : moec::programsIn(moec_programs, size))
            made.push_back(std::make_unique<moec::Launcher>(std::move(each)));
        return made;
    }();
    return found;
}

/// The failure for an input of another shape or type than expected.
moec::Failure wrong(int32_t input, std::string const& found, std::string const& expected) {
    return moec::refusal(std::string("input ") + kTensors[input].name, found, expected,
                         "export the model again");
}

void checkCount(int32_t count) {
    if (count != kInputs)
        throw moec::refusal("inputs", std::to_string(count), std::to_string(kInputs),
                            "export the model again");
}

/// The launcher for inputs of these shapes. A size of -1 stands for any number of tokens.
moec::Launcher& launcherFor(Dims const* const* dims, int32_t count) {
    checkCount(count);
    std::vector<std::vector<int64_t>> shapes;
    for (int32_t i = 0; i < kInputs; ++i)
        shapes.emplace_back(dims[i]->d, dims[i]->d + dims[i]->nbDims);
    std::string known, why, found;
    moec::Values values{};
    for (auto const& each : launchers()) {
        moec::Program const& program = each->program();
        std::size_t const fit = program.fits(shapes, values, why);
        if (fit == program.given.size()) return *each;
        if (fit > 1) throw moec::Failure(why + "; export the model again");  // x and router fit
        known += (known.empty() ? "" : "; or ") + program.text();
    }
    for (int32_t i = 0; i < kInputs; ++i)
        found += std::string(", ") + kTensors[i].name + " " + text(*dims[i]);
    throw moec::refusal("its plugin library", "no program for" + found.substr(1), known,
                        "load the library that was exported with this model");
}

moec::Launcher& launcherFor(DynamicPluginTensorDesc const* inputs, int32_t count) {
    Dims const* dims[kInputs];
    for (int32_t i = 0; i < std::min(count, kInputs); ++i) dims[i] = &inputs[i].desc.dims;
    return launcherFor(dims, count);
}

moec::Launcher& launcherFor(PluginTensorDesc const* inputs, int32_t count) {
    Dims const* dims[kInputs];
    for (int32_t i = 0; i < std::min(count, kInputs); ++i) dims[i] = &inputs[i].dims;
    return launcherFor(dims, count);
}

// -- the plugin -----------------------------------------------------------------------------------

class Plugin final : public IPluginV3,
                     public IPluginV3OneCore,
                     public IPluginV3OneBuild,
                     public IPluginV3OneRuntime {
public:
    /// `launcher` is null until the shapes of the inputs are known.
    Plugin(moec::Launcher* launcher, TensorRTPhase phase) : mLauncher(launcher), mPhase(phase) {}

    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
        switch (type) {
            case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
            case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
            case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }

    IPluginV3* clone() noexcept override { return new Plugin(mLauncher, mPhase); }

    AsciiChar const* getPluginName() const noexcept override { return kName; }
    AsciiChar const* getPluginVersion() const noexcept override { return kVersion; }
    AsciiChar const* getPluginNamespace() const noexcept override { return kNamespace; }

    int32_t getNbOutputs() const noexcept override { return 1; }

    int32_t getOutputDataTypes(DataType* outputs, int32_t, DataType const* inputs,
                               int32_t count) const noexcept override {
        return guarded([&] {
            checkCount(count);
            for (int32_t i = 0; i < kInputs; ++i)
                if (inputs[i] != kTensors[i].type)
                    throw wrong(i, text(inputs[i]), text(kTensors[i].type));
            outputs[0] = kTensors[kInputs].type;
        });
    }

    int32_t getOutputShapes(DimsExprs const* inputs, int32_t, DimsExprs const*, int32_t,
                            DimsExprs* outputs, int32_t, IExprBuilder&) noexcept override {
        outputs[0] = inputs[0];
        return 0;
    }

    bool supportsFormatCombination(int32_t position, DynamicPluginTensorDesc const* all, int32_t,
                                   int32_t) noexcept override {
        PluginTensorDesc const& found = all[position].desc;
        return found.format == TensorFormat::kLINEAR && found.type == kTensors[position].type;
    }

    int32_t configurePlugin(DynamicPluginTensorDesc const* inputs, int32_t count,
                            DynamicPluginTensorDesc const*, int32_t) noexcept override {
        return guarded([&] { mLauncher = &launcherFor(inputs, count); });
    }

    size_t getWorkspaceSize(DynamicPluginTensorDesc const* inputs, int32_t count,
                            DynamicPluginTensorDesc const*, int32_t) const noexcept override {
        int64_t found = 0;
        guarded([&] {
            found = launcherFor(inputs, count).program().workspace(inputs[0].max.d[0]);
        });
        return static_cast<size_t>(found);
    }

    int32_t onShapeChange(PluginTensorDesc const* inputs, int32_t count, PluginTensorDesc const*,
                          int32_t) noexcept override {
        return guarded([&] {
            moec::Launcher& found = launcherFor(inputs, count);
            if (mLauncher && mLauncher != &found)
                throw moec::refusal("shapes", found.program().text(), mLauncher->program().text(),
                                    "give the engine the weights that it was built for");
            mLauncher = &found;
            // A machine that builds engines may have no GPU. One that runs them loads kernels now.
            if (mPhase == TensorRTPhase::kRUNTIME) found.prepare();
        });
    }

    int32_t enqueue(PluginTensorDesc const* inputs, PluginTensorDesc const*,
                    void const* const* given, void* const* outputs, void* workspace,
                    cudaStream_t stream) noexcept override {
        return guarded([&] {
            if (!mLauncher) mLauncher = &launcherFor(inputs, kInputs);
            CUdeviceptr pointers[kInputs + 1];
            for (int32_t i = 0; i < kInputs; ++i)
                pointers[i] = reinterpret_cast<CUdeviceptr>(given[i]);
            pointers[kInputs] = reinterpret_cast<CUdeviceptr>(outputs[0]);
            moec::Values values{};
            values[moec::kTokens] = inputs[0].dims.d[0];
            mLauncher->run(values, pointers, reinterpret_cast<CUdeviceptr>(workspace),
                           mLauncher->program().workspace(values[moec::kTokens]), stream);
        });
    }

    IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }

    PluginFieldCollection const* getFieldsToSerialize() noexcept override {
        mFields.clear();
        if (mLauncher) {
            moec::Program const& program = mLauncher->program();
            mFields.emplace_back("sha256", program.sha.data(), PluginFieldType::kCHAR,
                                 static_cast<int32_t>(program.sha.size()));
        }
        mCollection.nbFields = static_cast<int32_t>(mFields.size());
        mCollection.fields = mFields.data();
        return &mCollection;
    }

private:
    moec::Launcher* mLauncher;
    TensorRTPhase mPhase;
    std::vector<PluginField> mFields;
    PluginFieldCollection mCollection{};
};

// -- the plugin's creator -------------------------------------------------------------------------

class Creator final : public IPluginCreatorV3One {
public:
    IPluginV3* createPlugin(AsciiChar const*, PluginFieldCollection const* fields,
                            TensorRTPhase phase) noexcept override {
        IPluginV3* made = nullptr;
        guarded([&] { made = new Plugin(known(*fields, phase), phase); });
        return made;
    }

    PluginFieldCollection const* getFieldNames() noexcept override { return &mNone; }
    AsciiChar const* getPluginName() const noexcept override { return kName; }
    AsciiChar const* getPluginVersion() const noexcept override { return kVersion; }
    AsciiChar const* getPluginNamespace() const noexcept override { return kNamespace; }

private:
    /// The launcher that a TensorRT engine was built with; null while an engine is being built.
    static moec::Launcher* known(PluginFieldCollection const& fields, TensorRTPhase phase) {
        std::string sha;
        for (int32_t i = 0; i < fields.nbFields; ++i) {
            PluginField const& each = fields.fields[i];
            if (!std::strcmp(each.name, "sha256"))
                sha.assign(static_cast<char const*>(each.data), each.length);
        }
        if (sha.empty() && phase == TensorRTPhase::kBUILD) return nullptr;
        if (sha.empty())
            throw moec::refusal("the engine", "no program's SHA-256", "a SHA-256", "build it again");
        std::string known;
        for (auto const& each : launchers()) {
            if (each->program().sha == sha) return each.get();
            known += (known.empty() ? "" : ", ") + each->program().sha;
        }
        throw moec::refusal("its plugin library", "program " + known, sha,
                            "load the engine's own library, or build the engine again");
    }

    PluginFieldCollection mNone{};
};

Creator gCreator;
IPluginCreatorInterface* const gCreators[] = {&gCreator};

}  // namespace

#define MOEC_PUBLIC extern "C" __attribute__((visibility("default")))

MOEC_PUBLIC IPluginCreatorInterface* const* getCreators(int32_t& count) {
    count = 1;
    return gCreators;
}

MOEC_PUBLIC void setLoggerFinder(ILoggerFinder* finder) {
    gFinder = finder;
}
