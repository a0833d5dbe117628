// ONNX Runtime's custom-op library: the fused ops of moec, as nodes of the domain "moec".
//
// The programs in the library say which ops there are, with which inputs and outputs. A node has
// the numbers of its op in the attribute "constants". For each call the shapes of its inputs choose
// the program. Kernels start on the session's stream, and nothing waits for them. An output that
// continues an input is that input, changed in place: if the caller has bound other memory to it,
// the input is copied there first.
#include <algorithm>
#include <deque>
#include <memory>

#include "driver.h"
#include "launcher.h"
#include "ort_api.h"

extern "C" uint8_t const moec_programs[];
extern "C" uint8_t const moec_programs_end[];

// A test without a GPU runs the nodes on another provider, with a driver that launches nothing.
#ifndef MOEC_PROVIDER
#define MOEC_PROVIDER "CUDAExecutionProvider"
#endif

namespace {

using moec::Given;
using moec::Launcher;
using moec::Program;

constexpr char kDomain[] = "moec";

OrtApi const* gApi = nullptr;

/// Throws Failure if `status` is an error.
void check(OrtStatus* status) {
    if (!status) return;
    std::string const text = ort::GetErrorMessage(gApi, status);
    ort::ReleaseStatus(gApi, status);
    throw moec::Failure(text);
}

/// Runs `call`, and returns what it throws as a status of ONNX Runtime; null: nothing.
template <class Call>
OrtStatus* guarded(std::string const& where, Call call) noexcept {
    try {
        call();
        return nullptr;
    } catch (std::exception const& error) {
        return ort::CreateStatus(gApi, ort::kInvalidArgument, (where + ": " + error.what()).c_str());
    }
}

/// An op of the domain. All its programs have inputs of the same names and types, but some of these
/// may be left out.
struct Op : OrtCustomOp {
    std::string name;
    std::vector<Given> inputs, outputs;
    std::vector<std::shared_ptr<Launcher>> launchers;
};

Op const& of(OrtCustomOp const* op) { return *static_cast<Op const*>(op); }

std::vector<int64_t> shapeOf(OrtValue const* value) {
    OrtTensorTypeAndShapeInfo* info = nullptr;
    check(ort::GetTensorTypeAndShape(gApi, value, &info));
    std::size_t count = 0;
    OrtStatus* status = ort::GetDimensionsCount(gApi, info, &count);
    std::vector<int64_t> found(count);
    if (!status) status = ort::GetDimensions(gApi, info, found.data(), count);
    ort::ReleaseTensorTypeAndShapeInfo(gApi, info);
    check(status);
    return found;
}

CUdeviceptr pointerOf(OrtValue const* value) {
    void* found = nullptr;
    check(ort::GetTensorMutableData(gApi, const_cast<OrtValue*>(value), &found));
    return reinterpret_cast<CUdeviceptr>(found);
}

/// The bytes of a tensor.
std::size_t bytesOf(Given const& given, std::vector<int64_t> const& shape) {
    int64_t found = moec::typeBytes(given.type);
    for (int64_t each : shape) found *= each;
    return static_cast<std::size_t>(found);
}

/// Memory of the session for one call. It is given back when the kernels that use it have been
/// started: memory that the session hands out next is used after them, on the same stream.
class Workspace {
public:
    Workspace(OrtKernelContext const* context, OrtMemoryInfo const* memory, int64_t bytes) {
        if (!bytes) return;
        check(ort::KernelContext_GetAllocator(gApi, context, memory, &mAllocator));
        if (OrtStatus* const status = ort::AllocatorAlloc(
                gApi, mAllocator, static_cast<std::size_t>(bytes), &mMemory)) {
            ort::ReleaseAllocator(gApi, mAllocator);
            check(status);
        }
    }

    ~Workspace() {
        if (!mMemory) return;
        if (OrtStatus* const status = ort::AllocatorFree(gApi, mAllocator, mMemory))
            ort::ReleaseStatus(gApi, status);
        ort::ReleaseAllocator(gApi, mAllocator);
    }

    Workspace(Workspace const&) = delete;
    Workspace& operator=(Workspace const&) = delete;

    CUdeviceptr pointer() const { return reinterpret_cast<CUdeviceptr>(mMemory); }

private:
    OrtAllocator* mAllocator = nullptr;
    void* mMemory = nullptr;
};

/// One node.
class Kernel {
public:
    Kernel(Op const& op, OrtKernelInfo const* info) : mOp(op) {
        std::size_t size = 0;
        check(ort::KernelInfoGetAttribute_string(gApi, info, "constants", nullptr, &size));
        std::string constants(size, 0);
        check(ort::KernelInfoGetAttribute_string(gApi, info, "constants", constants.data(), &size));
        constants = constants.c_str();  // without the zero at its end
        std::string known;
        for (auto const& each : op.launchers) {
            if (each->program().constants == constants) mLaunchers.push_back(each);
            known += (known.empty() ? "" : "; or ") + each->program().constants;
        }
        if (mLaunchers.empty())
            throw moec::refusal("its custom-op library", "no program for " + constants, known,
                                "open the model with the library that was made for it");
    }

    OrtStatus* compute(OrtKernelContext* context) noexcept {
        return guarded("moec::" + mOp.name, [&] { run(context); });
    }

private:
    void run(OrtKernelContext* context) {
        std::size_t const inputs = mOp.inputs.size();
        std::vector<OrtValue const*> values(inputs);
        std::vector<std::vector<int64_t>> shapes(inputs);
        OrtMemoryInfo const* memory = nullptr;
        for (std::size_t i = 0; i < inputs; ++i) {
            check(ort::KernelContext_GetInput(gApi, context, i, &values[i]));
            if (!values[i]) continue;
            shapes[i] = shapeOf(values[i]);
            if (!memory) check(ort::GetTensorMemoryInfo(gApi, values[i], &memory));
        }
        moec::Values sizes{};
        Launcher& launcher = launcherFor(values, shapes, sizes);
        void* stream = nullptr;
        check(ort::KernelContext_GetGPUComputeStream(gApi, context, &stream));
        auto const queue = static_cast<CUstream>(stream);
        std::vector<Given> const& given = launcher.program().given;
        std::vector<CUdeviceptr> pointers(given.size());
        for (std::size_t i = 0; i < inputs; ++i)
            if (values[i]) pointers[i] = pointerOf(values[i]);
        for (std::size_t i = inputs; i < given.size(); ++i) {
            std::vector<int64_t> const shape = shapeFor(given[i], sizes);
            pointers[i] = output(context, i - inputs, shape);
            if (given[i].continues < 0) continue;
            CUdeviceptr const from = pointers[static_cast<std::size_t>(given[i].continues)];
            if (from == pointers[i]) continue;
            moec::Driver const& cuda = moec::driver();
            cuda.check(cuda.cuMemcpyDtoDAsync(pointers[i], from, bytesOf(given[i], shape), queue),
                       "cuMemcpyDtoDAsync");
        }
        if (!sizes[moec::kTokens]) return;
        int64_t const room = launcher.workspace(sizes);
        Workspace const workspace(context, memory, room);
        // Kernels that others start here are not started early themselves, so that every one ahead
        // of it has ended when a kernel of theirs starts.
        launcher.run(sizes, pointers.data(), workspace.pointer(), room, queue, true);
    }

    /// The launcher for inputs of these shapes; `sizes` are the variables of the call.
    Launcher& launcherFor(std::vector<OrtValue const*> const& values,
                          std::vector<std::vector<int64_t>> const& shapes, moec::Values& sizes) {
        std::string why, last = "inputs: another set of them";
        for (auto const& each : mLaunchers) {
            Program const& program = each->program();
            bool same = true;
            for (std::size_t i = 0; i < values.size(); ++i)
                same = same && (program.given[i].role == Given::kInput) == (values[i] != nullptr);
            if (!same) continue;
            if (program.fits(shapes, sizes, why) == program.given.size()) return *each;
            last = why;
        }
        throw moec::Failure(last + "; open the model with the library that was made for it");
    }

    static std::vector<int64_t> shapeFor(Given const& given, moec::Values const& sizes) {
        std::vector<int64_t> found;
        for (int64_t each : given.sizes)
            found.push_back(each < 0 ? sizes[static_cast<std::size_t>(-1 - each)] : each);
        return found;
    }

    static CUdeviceptr output(OrtKernelContext* context, std::size_t index,
                              std::vector<int64_t> const& shape) {
        OrtValue* made = nullptr;
        check(ort::KernelContext_GetOutput(gApi, context, index, shape.data(), shape.size(), &made));
        return pointerOf(made);
    }

    Op const& mOp;
    std::vector<std::shared_ptr<Launcher>> mLaunchers;
};

/// Fills in the functions that ONNX Runtime calls.
void describe(Op& op) {
    static_cast<OrtCustomOp&>(op) = {};
    op.version = ort::kVersion;
    op.GetName = [](OrtCustomOp const* op) { return of(op).name.c_str(); };
    op.GetExecutionProviderType = [](OrtCustomOp const*) -> char const* { return MOEC_PROVIDER; };
    op.GetInputType = [](OrtCustomOp const* op, std::size_t i) {
        return static_cast<int>(of(op).inputs[i].type);
    };
    op.GetInputTypeCount = [](OrtCustomOp const* op) { return of(op).inputs.size(); };
    op.GetOutputType = [](OrtCustomOp const* op, std::size_t i) {
        return static_cast<int>(of(op).outputs[i].type);
    };
    op.GetOutputTypeCount = [](OrtCustomOp const* op) { return of(op).outputs.size(); };
    op.GetInputCharacteristic = [](OrtCustomOp const* op, std::size_t i) -> int {
        return of(op).inputs[i].role == Given::kLeftOut ? ort::kOptional : ort::kRequired;
    };
    op.GetOutputCharacteristic = [](OrtCustomOp const*, std::size_t) -> int {
        return ort::kRequired;
    };
    op.GetInputMemoryType = [](OrtCustomOp const*, std::size_t) { return ort::kOnDevice; };
    op.GetVariadicInputMinArity = op.GetVariadicInputHomogeneity =
        op.GetVariadicOutputMinArity = op.GetVariadicOutputHomogeneity =
            [](OrtCustomOp const*) { return 1; };
    op.GetStartVersion = [](OrtCustomOp const*) { return 1; };
    op.GetEndVersion = [](OrtCustomOp const*) { return INT32_MAX; };
    op.GetMayInplace = op.GetAliasMap = [](int**, int**) -> std::size_t { return 0; };
    op.ReleaseMayInplace = op.ReleaseAliasMap = [](int*, int*) {};
    op.CreateKernelV2 = [](OrtCustomOp const* op, OrtApi const*, OrtKernelInfo const* info,
                           void** made) {
        return guarded("moec::" + of(op).name, [&] { *made = new Kernel(of(op), info); });
    };
    op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
        return static_cast<Kernel*>(kernel)->compute(context);
    };
    op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
}

/// The ops of all programs. They live as long as the library.
std::deque<Op>& ops() {
    static std::deque<Op> found = [] {
        std::deque<Op> made;
        auto const size = static_cast<std::size_t>(moec_programs_end - moec_programs);
        for (Program& program : moec::programsIn(moec_programs, size)) {
            auto at = std::find_if(made.begin(), made.end(),
                                   [&](Op const& one) { return one.name == program.operation; });
            if (at == made.end()) {
                at = made.emplace(made.end());
                describe(*at);
                at->name = program.operation;
                for (Given const& each : program.given)
                    (each.role == Given::kOutput ? at->outputs : at->inputs).push_back(each);
            }
            if (program.given.size() != at->inputs.size() + at->outputs.size())
                throw moec::refusal("programs of " + program.operation,
                                    "other numbers of inputs and outputs", "the same",
                                    "build the library again");
            for (std::size_t i = 0; i < at->inputs.size(); ++i) {
                Given const& one = program.given[i];
                // The type is that of a program that has the input.
                if (one.role == Given::kInput) at->inputs[i].type = one.type;
                if (one.role == Given::kLeftOut) at->inputs[i].role = one.role;
            }
            at->launchers.push_back(std::make_shared<Launcher>(std::move(program)));
        }
        return made;
    }();
    return found;
}

}  // namespace

#define MOEC_PUBLIC extern "C" __attribute__((visibility("default")))

/// ONNX Runtime calls this for `SessionOptions.register_custom_ops_library`.
MOEC_PUBLIC OrtStatus* RegisterCustomOps(OrtSessionOptions* options, OrtApiBase const* base) {
    OrtApi const* const api = base->GetApi(ort::kVersion);
    if (!api)
        return ort::CreateStatus(base->GetApi(1), ort::kInvalidArgument,
                                 (std::string("moec's custom-op library: found ONNX Runtime ") +
                                  base->GetVersionString() + ", expected 1.18 or newer; update it")
                                     .c_str());
    gApi = api;
    return guarded("moec's custom-op library", [&] {
        // Made once and never released: sessions of any age use it.
        static OrtCustomOpDomain* const domain = [] {
            OrtCustomOpDomain* made = nullptr;
            check(ort::CreateCustomOpDomain(gApi, kDomain, &made));
            for (Op const& each : ops()) check(ort::CustomOpDomain_Add(gApi, made, &each));
            return made;
        }();
        check(ort::AddCustomOpDomain(gApi, options, domain));
    });
}
