// A program: the kernels and launches that run one MoE layer, read from bytes.
// moec/kernels/ahead_of_time/plugin_program.py writes them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace moec {

/// An error in one line: where it is, what was found, what was expected, what to do next.
struct Failure : std::runtime_error {
    using std::runtime_error::runtime_error;
};

Failure refusal(std::string const& where, std::string const& found, std::string const& expected,
                std::string const& next);

/// A number that depends on the number of tokens:
/// add + the sum of mul * ((tokens + shift) / period) over the terms (mul, shift).
struct Quantity {
    int64_t add{};
    int64_t period{1};
    std::vector<std::pair<int64_t, int64_t>> terms;

    int64_t at(int64_t tokens) const noexcept;
};

struct Parameter {
    enum Kind : int64_t { kPointer = 0, kNumber = 1, kMap = 2 };
    Kind kind{};
    int64_t slot{};     // of a pointer or a tensor map
    int64_t bytes{};    // size of a number
    Quantity value;     // value of a number, or rows of a tensor map's matrix
    int64_t columns{};  // of a tensor map's matrix; the rest says how the map cuts it into tiles
    int64_t tileRows{}, tileColumns{}, swizzle{}, element{}, elementBytes{};
};

struct Launch {
    int64_t kernel{};
    bool overlap{};
    Quantity grid[3];
    std::vector<Parameter> parameters;
};

struct Buffer {
    std::string name;
    Quantity bytes;
};

struct Variant {
    int64_t first{}, last{};
    std::vector<Buffer> buffers;
    std::vector<Launch> launches;
};

struct Target {
    int64_t architecture{};
    std::vector<Variant> variants;
};

struct Kernel {
    std::string name;
    uint8_t const* cubin{};  // points into the program's bytes
    int64_t threads{}, shared{};
};

struct Given {
    std::string name;
    int64_t rowBytes{};  // bytes for each token; 0 for memory that all tokens share
};

/// The size of a grid's axis that stands for the GPU's number of multiprocessors.
constexpr int64_t kEvery = -1;
/// Buffers start at multiples of this many bytes in the workspace.
constexpr int64_t kAlignment = 256;

struct Program {
    int64_t dim{}, hidden{}, experts{}, most{};
    std::string sha;    // SHA-256 of its bytes, in hexadecimal
    std::size_t size{}; // in bytes; the next program follows
    std::vector<Given> given;
    std::vector<Kernel> kernels;
    std::vector<Target> targets;

    /// Throws Failure if `bytes` is not a whole program. Cubins are not copied.
    Program(uint8_t const* bytes, std::size_t room);

    /// The bytes of workspace for up to `tokens` tokens on any GPU.
    int64_t workspace(int64_t tokens) const noexcept;
    /// The target of a compute capability, such as 89. Throws Failure if there is none.
    Target const& target(int64_t architecture) const;
    std::string sizes() const;
};

/// The variant for `tokens` tokens, from 1 to the program's `most`.
Variant const& variantFor(Target const& target, int64_t tokens);

/// The offsets of a variant's buffers in bytes, and as the last number the size of them all.
std::vector<int64_t> placed(Variant const& variant, int64_t tokens);

}  // namespace moec
