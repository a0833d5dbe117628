// The launcher's C interface, for callers in other languages. A function that fails writes a
// message and returns null or a number other than 0.
#include <algorithm>
#include <cstring>

#include "launcher.h"

#define MOEC_PUBLIC extern "C" __attribute__((visibility("default")))

namespace {

template <class Call>
int guarded(char* message, std::size_t room, Call call) noexcept {
    try {
        call();
        return 0;
    } catch (std::exception const& error) {
        if (room) {
            std::strncpy(message, error.what(), room - 1);
            message[room - 1] = 0;
        }
        return 1;
    }
}

moec::Values valuesAt(int64_t const* variables) {
    moec::Values found;
    std::copy(variables, variables + moec::kVariables, found.begin());
    return found;
}

}  // namespace

/// Makes a launcher for the program in `bytes`, which must live as long as the launcher.
MOEC_PUBLIC void* moec_open(void const* bytes, std::size_t size, char* message, std::size_t room) {
    moec::Launcher* made = nullptr;
    guarded(message, room, [&] {
        made = new moec::Launcher(moec::Program(static_cast<uint8_t const*>(bytes), size));
    });
    return made;
}

MOEC_PUBLIC void moec_close(void* launcher) { delete static_cast<moec::Launcher*>(launcher); }

/// The bytes of workspace for calls of up to `tokens` tokens, whose only variable is that.
MOEC_PUBLIC int64_t moec_workspace(void const* launcher, int64_t tokens) {
    return static_cast<moec::Launcher const*>(launcher)->program().workspace(tokens);
}

/// The bytes of workspace of a call with these `variables` on the calling thread's GPU.
MOEC_PUBLIC int moec_room(void const* launcher, int64_t const* variables, int64_t* bytes,
                          char* message, std::size_t room) {
    return guarded(message, room, [&] {
        *bytes = static_cast<moec::Launcher const*>(launcher)->workspace(valuesAt(variables));
    });
}

/// Loads all kernels for the calling thread's GPU. Call it before a CUDA graph is captured.
MOEC_PUBLIC int moec_prepare(void* launcher, char* message, std::size_t room) {
    return guarded(message, room, [&] { static_cast<moec::Launcher*>(launcher)->prepare(); });
}

/// Starts the operation. `variables` has one number for each variable; `given` holds pointers
/// to GPU memory, as for `Launcher::run`.
MOEC_PUBLIC int moec_run(void* launcher, int64_t const* variables, uint64_t const* given,
                         uint64_t workspace, int64_t workspaceBytes, void* stream, char* message,
                         std::size_t room) {
    return guarded(message, room, [&] {
        auto* const found = static_cast<moec::Launcher*>(launcher);
        std::vector<CUdeviceptr> const pointers(given, given + found->program().given.size());
        found->run(valuesAt(variables), pointers.data(), workspace, workspaceBytes,
                   static_cast<CUstream>(stream));
    });
}
