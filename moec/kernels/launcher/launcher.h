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

    /// Loads all kernels for the calling thread's GPU. Call it before the capture of a CUDA graph,
    /// which does not allow loading. Throws Failure if there is no driver, no CUDA context or no
    /// kernel for this GPU.
    void prepare();

    /// The bytes of workspace that a call needs on the calling thread's GPU. Throws Failure.
    int64_t workspace(Values const& values) const;

    /// Starts the operation on `stream`. `given` holds pointers to GPU memory, in the order of the
    /// program; those of inputs that are left out are 0. `workspace` has `room` bytes. All pointers
    /// are aligned to 16 bytes. The first kernel `follows` another launcher's on the stream if
    /// nothing else was started between them; it may then start early. Several threads may call
    /// this at once if each has its own workspace. Throws Failure.
    void run(Values const& values, CUdeviceptr const* given, CUdeviceptr workspace, int64_t room,
             CUstream stream, bool follows = false);

private:
    /// The kernel with index `kernel`, loaded for a CUDA context.
    CUfunction function(unsigned long long context, int64_t kernel);

    Program mProgram;
    std::mutex mMutex;
    std::map<std::pair<unsigned long long, int64_t>, CUfunction> mLoaded;
};

}  // namespace moec
