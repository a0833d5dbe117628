// Continues token ids greedily with an artefact of target ort-cuda, in ONNX Runtime alone.
//
//     moec library ARTEFACT --out LIB
//     g++ -std=c++17 -O2 generate.cpp -I ORT/include -L ORT/lib -lonnxruntime -o generate
//     ./generate ARTEFACT/model.onnx LIB/libmoec_ort.so CHUNK NEW ID...
//
// ORT is the folder of onnxruntime-gpu's C++ package. CHUNK is the model's attention chunk
// (`chunk` of the text model in manifest.json), NEW how many tokens to add. The ids of the whole
// text are printed. Weights are read by ONNX Runtime from the files beside model.onnx.
#include <onnxruntime_c_api.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <set>
#include <string>
#include <vector>

namespace {

OrtApi const* const ort = OrtGetApiBase()->GetApi(18);

void check(OrtStatus* status) {
    if (!status) return;
    std::fprintf(stderr, "error: %s\n", ort->GetErrorMessage(status));
    std::exit(1);
}

/// Calls a function of the API whose last argument is the place of its result.
template <class Result, class... Parameters, class... Given>
Result made(OrtStatus* (*call)(Parameters...), Given... given) {
    Result found{};
    check(call(given..., &found));
    return found;
}

OrtMemoryInfo* memory(char const* name, OrtAllocatorType kind) {
    return made<OrtMemoryInfo*>(ort->CreateMemoryInfo, name, kind, 0, OrtMemTypeDefault);
}

/// A tensor on the host, whose numbers `of` keeps.
template <class Number>
OrtValue* tensor(OrtMemoryInfo* host, std::vector<Number>& of, std::vector<int64_t> shape,
                 ONNXTensorElementDataType type) {
    return made<OrtValue*>(ort->CreateTensorWithDataAsOrtValue, host,
                           static_cast<void*>(of.data()), of.size() * sizeof(Number), shape.data(),
                           shape.size(), type);
}

/// A cache: an input of the model, and the memory on the GPU that holds it.
struct Cache {
    std::string name;
    OrtValue* value{};
};

/// A model without chunked layers has no input `ring.last`, one without others no `global.last`.
struct Inputs {
    std::vector<Cache> caches;
    std::set<std::string> others;
};

/// The inputs, with the caches of one sequence. Those of chunked layers have `chunk` slots, the
/// others `slots`.
Inputs inputs(OrtSession* session, OrtMemoryInfo* device, int64_t slots, int64_t chunk) {
    auto* const host = made<OrtAllocator*>(ort->GetAllocatorWithDefaultOptions);
    auto* const there = made<OrtAllocator*>(ort->CreateAllocator, session, device);
    Inputs found;
    auto const count = made<std::size_t>(ort->SessionGetInputCount, session);
    for (std::size_t i = 0; i < count; ++i) {
        std::string const name = made<char*>(ort->SessionGetInputName, session, i, host);
        if (name.rfind("past.", 0) != 0) {
            found.others.insert(name);
            continue;
        }
        auto* const type = made<OrtTypeInfo*>(ort->SessionGetInputTypeInfo, session, i);
        auto* const info =
            made<OrtTensorTypeAndShapeInfo const*>(ort->CastTypeInfoToTensorInfo, type);
        int64_t shape[4];  // [batch, heads, slots, size]
        char const* symbols[4];
        check(ort->GetDimensions(info, shape, 4));
        check(ort->GetSymbolicDimensions(info, symbols, 4));
        shape[0] = 1;
        shape[2] = std::string(symbols[2]) == "ring_slots" ? std::min(slots, chunk) : slots;
        std::size_t const bytes = 2 * shape[1] * shape[2] * shape[3];  // bf16
        auto* const place = made<void*>(ort->AllocatorAlloc, there, bytes);
        found.caches.push_back(
            {name, made<OrtValue*>(ort->CreateTensorWithDataAsOrtValue, device, place, bytes, shape,
                                   std::size_t{4}, ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16)});
        ort->ReleaseTypeInfo(type);
    }
    return found;
}

/// Runs tokens `first` to `end` of `ids`, which lie in one chunk; returns the likeliest next one.
int64_t step(OrtSession* session, OrtMemoryInfo* host, Inputs const& kept,
             std::vector<int64_t> const& ids, int64_t first, int64_t end, int64_t chunk) {
    std::vector<int64_t> piece(ids.begin() + first, ids.begin() + end), past{first};
    std::vector<int64_t> index{end - first - 1};
    std::vector<int32_t> everywhere{static_cast<int32_t>(end - 1)};
    std::vector<int32_t> ring{static_cast<int32_t>((end - 1) % chunk)};
    constexpr auto k64 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
    constexpr auto k32 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
    std::map<std::string, OrtValue*> const fed{
        {"input_ids", tensor(host, piece, {1, end - first}, k64)},
        {"past_lengths", tensor(host, past, {1}, k64)},
        {"logit_index", tensor(host, index, {1, 1}, k64)},
        {"global.last", tensor(host, everywhere, {1}, k32)},
        {"ring.last", tensor(host, ring, {1}, k32)},
    };
    auto* const binding = made<OrtIoBinding*>(ort->CreateIoBinding, session);
    for (auto const& [name, value] : fed)
        if (kept.others.count(name)) check(ort->BindInput(binding, name.c_str(), value));
    check(ort->BindOutputToDevice(binding, "logits", host));
    for (Cache const& each : kept.caches) {  // a cache is changed in place
        check(ort->BindInput(binding, each.name.c_str(), each.value));
        std::string const after = "present" + each.name.substr(4);
        check(ort->BindOutput(binding, after.c_str(), each.value));
    }
    check(ort->SynchronizeBoundInputs(binding));
    check(ort->RunWithBinding(session, nullptr, binding));
    check(ort->SynchronizeBoundOutputs(binding));
    auto* const allocator = made<OrtAllocator*>(ort->GetAllocatorWithDefaultOptions);
    OrtValue** results = nullptr;
    std::size_t count = 0;
    check(ort->GetBoundOutputValues(binding, allocator, &results, &count));
    auto* const info = made<OrtTensorTypeAndShapeInfo*>(ort->GetTensorTypeAndShape, results[0]);
    auto const vocab = made<std::size_t>(ort->GetTensorShapeElementCount, info);
    auto* const logits = static_cast<float*>(made<void*>(ort->GetTensorMutableData, results[0]));
    int64_t const best = std::max_element(logits, logits + vocab) - logits;
    for (std::size_t i = 0; i < count; ++i) ort->ReleaseValue(results[i]);
    check(ort->AllocatorFree(allocator, results));
    ort->ReleaseTensorTypeAndShapeInfo(info);
    ort->ReleaseIoBinding(binding);
    for (auto const& each : fed) ort->ReleaseValue(each.second);
    return best;
}

}  // namespace

int main(int count, char** given) {
    if (count < 6) {
        std::fprintf(stderr, "usage: generate MODEL LIBRARY CHUNK NEW ID...\n");
        return 2;
    }
    int64_t const chunk = std::atoll(given[3]), more = std::atoll(given[4]);
    std::vector<int64_t> ids;
    for (int i = 5; i < count; ++i) ids.push_back(std::atoll(given[i]));
    auto* const env = made<OrtEnv*>(ort->CreateEnv, ORT_LOGGING_LEVEL_ERROR, "moec");
    auto* const options = made<OrtSessionOptions*>(ort->CreateSessionOptions);
    check(ort->RegisterCustomOpsLibrary_V2(options, given[2]));
    auto* const cuda = made<OrtCUDAProviderOptionsV2*>(ort->CreateCUDAProviderOptions);
    check(ort->SessionOptionsAppendExecutionProvider_CUDA_V2(options, cuda));
    auto* const session = made<OrtSession*>(ort->CreateSession, env, given[1], options);
    auto* const host = memory("Cpu", OrtDeviceAllocator);
    int64_t const prompt = static_cast<int64_t>(ids.size());
    auto const kept = inputs(session, memory("Cuda", OrtDeviceAllocator), prompt + more, chunk);
    int64_t next = 0;
    for (int64_t at = 0, end; at < prompt; at = end) {  // no call crosses the end of a chunk
        end = std::min(prompt, (at / chunk + 1) * chunk);
        next = step(session, host, kept, ids, at, end, chunk);
    }
    for (int64_t at = prompt; at < prompt + more; ++at) {
        ids.push_back(next);
        if (at + 1 < prompt + more) next = step(session, host, kept, ids, at, at + 1, chunk);
    }
    for (int64_t each : ids) std::printf("%lld ", static_cast<long long>(each));
    std::printf("\n");
    return 0;
}
