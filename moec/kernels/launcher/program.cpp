// See program.h.
#include "program.h"

#include <algorithm>
#include <cstring>

namespace moec {

namespace {

constexpr char kMagic[] = "moecprog";
constexpr int64_t kVersion = 2;
constexpr std::size_t kHead = 8 + 32 + 3 * 8;

std::string hexadecimal(uint8_t const* bytes, std::size_t count) {
    static char const digits[] = "0123456789abcdef";
    std::string found;
    for (std::size_t i = 0; i < count; ++i) {
        found += digits[bytes[i] >> 4];
        found += digits[bytes[i] & 15];
    }
    return found;
}

Failure broken(std::string const& found) {
    return refusal("a moec program", found, "a program that this version of moec wrote",
                   "export again with one version of moec");
}

/// Reads one integer after another, and the data that integers point to.
class Reader {
public:
    Reader(uint8_t const* bytes, std::size_t room) {
        if (room < kHead || std::memcmp(bytes, kMagic, 8) != 0) throw broken("no head");
        int64_t head[3];
        std::memcpy(head, bytes + 40, sizeof head);
        if (head[0] != kVersion) throw broken("version " + std::to_string(head[0]));
        auto const left = static_cast<int64_t>(room - kHead);
        if (head[1] < 0 || head[2] < 0 || head[1] > left / 8 || head[2] > left - 8 * head[1])
            throw broken("fewer bytes than its head says");
        mIntegers = bytes + kHead;
        mEnd = mIntegers + 8 * head[1];
        mData = mEnd;
        mDataBytes = head[2];
        size = kHead + static_cast<std::size_t>(8 * head[1] + head[2]);
    }

    std::size_t size{};

    int64_t next() {
        if (mIntegers == mEnd) throw broken("too few integers");
        int64_t found;
        std::memcpy(&found, mIntegers, 8);
        mIntegers += 8;
        return found;
    }

    int64_t below(int64_t end) {
        int64_t const found = next();
        if (found < 0 || found >= end) throw broken("an index out of range");
        return found;
    }

    std::pair<uint8_t const*, int64_t> data() {
        int64_t const offset = next(), length = next();
        if (offset < 0 || length < 0 || offset > mDataBytes || length > mDataBytes - offset)
            throw broken("data out of range");
        return {mData + offset, length};
    }

    Quantity quantity() {
        Quantity found;
        found.of = below(kVariables);
        found.add = next();
        found.period = next();
        if (found.period < 1) throw broken("a period below 1");
        many(found.terms, [&] {
            int64_t const mul = next();
            return std::pair<int64_t, int64_t>{mul, next()};
        });
        return found;
    }

    template <class Item, class Read>
    void many(std::vector<Item>& into, Read read) {
        for (int64_t count = next(); count > 0; --count) into.push_back(read());
    }

private:
    uint8_t const* mIntegers{};
    uint8_t const* mEnd{};
    uint8_t const* mData{};
    int64_t mDataBytes{};
};

Parameter parameter(Reader& from, int64_t slots) {
    Parameter found;
    auto slot = [&] {
        int64_t const at = from.next();
        if (at < -1 || at >= slots) throw broken("a slot out of range");
        return at;
    };
    found.kind = static_cast<Parameter::Kind>(from.below(3));
    if (found.kind == Parameter::kPointer) {
        found.slot = slot();
    } else if (found.kind == Parameter::kNumber) {
        found.bytes = from.next();
        if (found.bytes < 1 || found.bytes > 8) throw broken("a number of no size");
        found.value = from.quantity();
    } else {
        found.slot = from.below(slots);
        found.value = from.quantity();
        for (int64_t* each : {&found.columns, &found.tileRows, &found.tileColumns, &found.swizzle,
                              &found.element, &found.elementBytes})
            *each = from.next();
    }
    return found;
}

}  // namespace

Failure refusal(std::string const& where, std::string const& found, std::string const& expected,
                std::string const& next) {
    return Failure(where + ": found " + found + ", expected " + expected + "; " + next);
}

int64_t Quantity::at(Values const& values) const noexcept {
    int64_t found = add;
    for (auto const& [mul, shift] : terms)
        found += mul * ((values[static_cast<std::size_t>(of)] + shift) / period);
    return found;
}

struct Type {
    int64_t number;
    char const* name;
    int64_t bytes;
};

/// As ONNX numbers them.
constexpr Type kTypes[] = {{1, "float32", 4},  {6, "int32", 4}, {7, "int64", 8},
                           {10, "float16", 2}, {16, "bf16", 2}, {17, "float8e4m3fn", 1}};

std::string typeName(int64_t type) {
    for (Type const& each : kTypes)
        if (each.number == type) return each.name;
    return "type " + std::to_string(type);
}

int64_t typeBytes(int64_t type) noexcept {
    for (Type const& each : kTypes)
        if (each.number == type) return each.bytes;
    return 0;
}

constexpr char const* kNames[kVariables] = {"tokens", "batch", "slots", "steps", "places"};

std::string sizesText(std::vector<int64_t> const& sizes) {
    std::string found;
    for (int64_t each : sizes)
        found += (found.empty() ? "" : ", ") +
                 (each < 0 ? std::string(kNames[-1 - each]) : std::to_string(each));
    return "[" + found + "]";
}

int64_t Given::rowBytes() const noexcept {
    if (sizes.empty() || sizes[0] != -1 - kTokens) return 0;
    int64_t found = typeBytes(type);
    for (std::size_t i = 1; i < sizes.size(); ++i) found *= sizes[i];
    return found;
}

std::string Given::text() const { return typeName(type) + " " + sizesText(sizes); }

Program::Program(uint8_t const* bytes, std::size_t room) {
    Reader from(bytes, room);
    size = from.size;
    sha = hexadecimal(bytes + 8, 32);
    std::vector<std::string> names;
    from.many(names, [&] {
        auto const [at, length] = from.data();
        return std::string(reinterpret_cast<char const*>(at), static_cast<std::size_t>(length));
    });
    auto name = [&] { return names[from.below(static_cast<int64_t>(names.size()))]; };
    operation = name();
    constants = name();
    most = from.next();
    if (most < 0) throw broken("parts of less than no token");
    from.many(given, [&] {
        Given one;
        one.name = name();
        one.role = static_cast<Given::Role>(from.below(3));
        one.continues = from.next();
        one.type = from.next();
        from.many(one.sizes, [&] {
            int64_t const found = from.next();
            if (found < -kVariables) throw broken("a variable out of range");
            return found;
        });
        if (!typeBytes(one.type)) throw broken("an unknown type");
        return one;
    });
    for (Given const& each : given)
        if (each.continues < -1 || each.continues >= static_cast<int64_t>(given.size()))
            throw broken("a given out of range");
    from.many(kernels, [&] {
        Kernel one;
        one.name = name();
        one.cubin = from.data().first;
        one.threads = from.next();
        one.shared = from.next();
        return one;
    });
    from.many(targets, [&] {
        Target target;
        target.architecture = from.next();
        from.many(target.variants, [&] {
            Variant variant;
            from.many(variant.ranges, [&] {
                Range one;
                one.of = from.below(kVariables);
                one.first = from.next();
                one.last = from.next();
                return one;
            });
            from.many(variant.buffers, [&] {
                Buffer one;
                one.name = name();
                one.bytes = from.quantity();
                return one;
            });
            auto const slots = static_cast<int64_t>(given.size() + variant.buffers.size());
            from.many(variant.launches, [&] {
                Launch one;
                one.kernel = from.below(static_cast<int64_t>(kernels.size()));
                one.overlap = from.next() != 0;
                for (Quantity& axis : one.grid) axis = from.quantity();
                from.many(one.parameters, [&] { return parameter(from, slots); });
                return one;
            });
            return variant;
        });
        return target;
    });
}

std::size_t Program::fits(std::vector<std::vector<int64_t>> const& shapes, Values& values,
                          std::string& why) const {
    std::array<bool, kVariables> known{};
    values.fill(0);
    for (std::size_t i = 0; i < given.size() && i < shapes.size(); ++i) {
        Given const& each = given[i];
        if (each.role != Given::kInput) continue;
        bool fit = shapes[i].size() == each.sizes.size();
        for (std::size_t axis = 0; fit && axis < each.sizes.size(); ++axis) {
            int64_t const wanted = each.sizes[axis], found = shapes[i][axis];
            if (wanted >= 0) {
                fit = wanted == found;
                continue;
            }
            auto const of = static_cast<std::size_t>(-1 - wanted);
            fit = !known[of] || values[of] == found;
            known[of] = true;
            values[of] = found;
        }
        if (!fit) {
            why = "input " + each.name + ": found " + sizesText(shapes[i]) + ", expected " +
                  sizesText(each.sizes);
            return i;
        }
    }
    if (known[kTokens] && known[kBatch]) {
        int64_t const batch = values[kBatch], tokens = values[kTokens];
        if (batch < 1 || tokens % batch || (known[kSteps] && values[kSteps] != tokens / batch)) {
            why = "inputs: found " + std::to_string(tokens) + " tokens, expected a multiple of " +
                  std::to_string(batch) + ", the batch";
            return 0;
        }
        values[kSteps] = tokens / batch;
    }
    values[kPlaces] = values[kBatch] * values[kSlots];
    return given.size();
}

int64_t Program::workspace(Target const& target, Values const& values) const {
    Values part = values;
    int64_t found = 0;
    for (int64_t left = values[kTokens]; left > 0; left -= part[kTokens]) {
        part[kTokens] = most ? std::min(left, most) : left;
        found = std::max(found, placed(variantFor(target, part), part).back());
    }
    return found;
}

int64_t Program::workspace(int64_t tokens) const noexcept {
    int64_t found = 0;
    int64_t const end = std::min(tokens, most);
    for (Target const& target : targets)
        for (Variant const& variant : target.variants)
            for (Range const& range : variant.ranges)
                if (range.of == kTokens && range.first <= end) {
                    Values values{};
                    values[kTokens] = std::min(end, range.last);
                    // within a variant, more tokens never need less
                    found = std::max(found, placed(variant, values).back());
                }
    return found;
}

Target const& Program::target(int64_t architecture) const {
    std::string known;
    for (Target const& each : targets) {
        if (each.architecture == architecture) return each;
        known += (known.empty() ? "" : ", ") + std::to_string(each.architecture);
    }
    throw refusal("this GPU", "compute capability " + std::to_string(architecture), known,
                  "export for that compute capability too");
}

std::string Program::text() const {
    std::string found = operation;
    if (!constants.empty()) found += " (" + constants + ")";
    for (Given const& each : given)
        if (each.role == Given::kInput) found += ", " + each.name + " " + each.text();
    return found;
}

std::vector<Program> programsIn(uint8_t const* bytes, std::size_t size) {
    std::vector<Program> found;
    for (std::size_t at = 0; at < size; at += found.back().size)
        found.emplace_back(bytes + at, size - at);
    return found;
}

Variant const& variantFor(Target const& target, Values const& values) {
    std::string shown;
    for (std::size_t i = 0; i < kVariables; ++i)
        if (values[i])
            shown += (shown.empty() ? "" : ", ") + std::to_string(values[i]) + " " + kNames[i];
    for (Variant const& each : target.variants)
        if (std::all_of(each.ranges.begin(), each.ranges.end(), [&](Range const& one) {
                int64_t const found = values[static_cast<std::size_t>(one.of)];
                return one.first <= found && found <= one.last;
            }))
            return each;
    throw refusal("a call", shown, "sizes that its program was made for", "make smaller calls");
}

std::vector<int64_t> placed(Variant const& variant, Values const& values) {
    std::vector<int64_t> found{0};
    for (Buffer const& each : variant.buffers) {
        int64_t const end = found.back() + each.bytes.at(values);
        found.push_back((end + kAlignment - 1) / kAlignment * kAlignment);
    }
    return found;
}

}  // namespace moec
