// A program as read from its bytes: what runs one MoE layer. moec/kernels/ahead_of_time/plugin_program.py writes them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace moec {

/// What goes wrong, in one line: where, what was found, what was expected, what to do next.
struct Failure : std::runtime_error {
    using std::runtime_error::runtime_error;
};

Failure refusal(std::string const& where, std::string const& found, std::string const& expected,
                std::string const& next);

/// What follows from a number of tokens: add, and the sum of mul * ((tokens + shift) / period).
struct Quantity {
    int64_t add{};
    int64_t period{1};
    std::vector<std::pair<int64_t, int64_t>> terms;

    int64_t at(int64_t tokens) const noexcept;
};

struct Parameter {
    enum Kind : int64_t { kPointer = 0, kNumber = 1, kMap = 2 };
    Kind kind{};
    int64_t slot{};     // of a pointer or a map
    int64_t bytes{};    // of a number
    Quantity value;     // a number's value, or the rows of a map's matrix
    int64_t columns{};  // of a map's matrix; the rest says how it is cut into tiles
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
    uint8_t const* cubin{};  // in the program's bytes
    int64_t threads{}, shared{};
};

struct Given {
    std::string name;
    int64_t rowBytes{};  // 0: the same memory for all tokens
};

/// A grid's axis that stands for as many programs as the GPU has multiprocessors.
constexpr int64_t kEvery = -1;
/// Buffers start at multiples of this from where a workspace starts.
constexpr int64_t kAlignment = 256;

struct Program {
    int64_t dim{}, hidden{}, experts{}, most{};
    std::string sha;    // of its bytes, in hexadecimal
    std::size_t size{}; // bytes, with which the next one starts
    std::vector<Given> given;
    std::vector<Kernel> kernels;
    std::vector<Target> targets;

    /// Throws Failure where `bytes` is not a whole program. Cubins are read where they are.
    Program(uint8_t const* bytes, std::size_t room);

    /// Bytes that any GPU needs for up to so many tokens.
    int64_t workspace(int64_t tokens) const noexcept;
    /// The target of a compute capability; throws Failure where there is none.
    Target const& target(int64_t architecture) const;
    std::string sizes() const;
};

/// The variant for so many tokens, 1 to the program's most.
Variant const& variantFor(Target const& target, int64_t tokens);

/// Offsets of a variant's buffers, and behind the last of them what they take together.
std::vector<int64_t> placed(Variant const& variant, int64_t tokens);

}  // namespace moec
