// A program: the kernels and launches that run one operation, read from bytes. The bytes are part of
// the library, so that they are trusted: reading them checks places, and not what numbers mean.
// moec/kernels/ahead_of_time/program.py writes them.
#pragma once

#include <array>
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

/// The sizes that differ from call to call, in the order of the format's variables. One that an
/// operation does not have is 0. Steps are tokens / batch, places are batch * slots.
enum Variable : int64_t { kTokens = 0, kBatch = 1, kSlots = 2, kSteps = 3, kPlaces = 4, kVariables = 5 };
using Values = std::array<int64_t, kVariables>;

/// A number that depends on the variable `of`:
/// add + the sum of mul * ((variable + shift) / period) over the terms (mul, shift).
struct Quantity {
    int64_t of{};
    int64_t add{};
    int64_t period{1};
    std::vector<std::pair<int64_t, int64_t>> terms;

    int64_t at(Values const& values) const noexcept;
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

/// Holds where each variable of `ranges` is from `first` to `last`.
struct Range {
    int64_t of{}, first{}, last{};
};

struct Variant {
    std::vector<Range> ranges;
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

/// A tensor that the caller gives.
struct Given {
    enum Role : int64_t { kInput = 0, kOutput = 1, kLeftOut = 2 };
    std::string name;
    Role role{};
    int64_t continues{};         // the given that this output is, changed in place; -1: none
    int64_t type{};              // as ONNX numbers types
    std::vector<int64_t> sizes;  // numbers; -1 - v stands for variable v

    /// The bytes of one token's row if the first axis has the tokens; else 0.
    int64_t rowBytes() const noexcept;
    /// "bf16 [tokens, 5120]", for messages.
    std::string text() const;
};

/// The size of a grid's axis that stands for the GPU's number of multiprocessors.
constexpr int64_t kEvery = -1;
/// Buffers start at multiples of this many bytes in the workspace.
constexpr int64_t kAlignment = 256;

struct Program {
    std::string operation, constants;
    int64_t most{};      // tokens of a part of a call; 0: calls cannot be divided
    std::string sha;     // SHA-256 of its bytes, in hexadecimal
    std::size_t size{};  // in bytes; the next program follows
    std::vector<Given> given;
    std::vector<Kernel> kernels;
    std::vector<Target> targets;

    /// Throws Failure if `bytes` is not a whole program. Cubins are not copied.
    Program(uint8_t const* bytes, std::size_t room);

    /// Finds the variables of a call with inputs of these shapes, in the order of `given`. Inputs
    /// that are left out have no shape. Returns how many of `given` fit, which is all of them or
    /// the place of the first that does not; then `why` says what was expected.
    std::size_t fits(std::vector<std::vector<int64_t>> const& shapes, Values& values,
                     std::string& why) const;
    /// The bytes of workspace of a call. Throws Failure if no variant takes it.
    int64_t workspace(Target const& target, Values const& values) const;
    /// The bytes of workspace for calls of up to `tokens` tokens on any GPU, whose only variable is
    /// that.
    int64_t workspace(int64_t tokens) const noexcept;
    /// The target of a compute capability, such as 89. Throws Failure if there is none.
    Target const& target(int64_t architecture) const;
    /// The operation, its constants and its inputs, for messages.
    std::string text() const;
};

/// All programs in `bytes`, one after another. Throws Failure.
std::vector<Program> programsIn(uint8_t const* bytes, std::size_t size);

/// The variant for a call or a part of one. Throws Failure if there is none.
Variant const& variantFor(Target const& target, Values const& values);

/// The offsets of a variant's buffers in bytes, and as the last number the size of them all.
std::vector<int64_t> placed(Variant const& variant, Values const& values);

/// The name of a type that ONNX numbers so, and the bytes of an element.
std::string typeName(int64_t type);
int64_t typeBytes(int64_t type) noexcept;

}  // namespace moec
