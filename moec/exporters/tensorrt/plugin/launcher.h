// Launches a program's kernels on the GPU of the calling thread, with CUDA's driver API alone.
#pragma once

#include <cuda.h>

#include <map>
#include <mutex>
#include <utility>

#include "program.h"

namespace moec {

class Launcher {
public:
    explicit Launcher(Program program) : mProgram(std::move(program)) {}

    Program const& program() const noexcept { return mProgram; }

    /// Loads all that this thread's GPU may need, which a CUDA graph's capture would not allow.
    /// Throws Failure: no driver, no context, no kernels for this GPU.
    void prepare();

    /// Starts the layer for `tokens` rows on `stream`. `given` are pointers in the program's order;
    /// `workspace` has `room` bytes. All are aligned to 16 bytes. Any number of threads may run at
    /// a time, with a workspace each. Throws Failure.
    void run(int64_t tokens, CUdeviceptr const* given, CUdeviceptr workspace, int64_t room,
             CUstream stream);

private:
    /// A kernel loaded for a context.
    CUfunction function(unsigned long long context, int64_t kernel);

    Program mProgram;
    std::mutex mMutex;
    std::map<std::pair<unsigned long long, int64_t>, CUfunction> mLoaded;
};

}  // namespace moec
