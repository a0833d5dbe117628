// See program.h.
#include "program.h"

#include <algorithm>
#include <cstring>

namespace moec {

namespace {

constexpr char kMagic[] = "moecprog";
constexpr int64_t kVersion = 1;
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
        found.slot = slot();
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

int64_t Quantity::at(int64_t tokens) const noexcept {
    int64_t found = add;
    for (auto const& [mul, shift] : terms) found += mul * ((tokens + shift) / period);
    return found;
}

Program::Program(uint8_t const* bytes, std::size_t room) {
    Reader from(bytes, room);
    size = from.size;
    sha = hexadecimal(bytes + 8, 32);
    dim = from.next();
    hidden = from.next();
    experts = from.next();
    most = from.next();
    std::vector<std::string> names;
    from.many(names, [&] {
        auto const [at, length] = from.data();
        return std::string(reinterpret_cast<char const*>(at), static_cast<std::size_t>(length));
    });
    auto name = [&] { return names[from.below(static_cast<int64_t>(names.size()))]; };
    from.many(given, [&] {
        Given one;
        one.name = name();
        one.rowBytes = from.next();
        return one;
    });
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
            variant.first = from.next();
            variant.last = from.next();
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

int64_t Program::workspace(int64_t tokens) const noexcept {
    int64_t found = 0;
    int64_t const end = std::min(tokens, most);
    for (Target const& target : targets)
        for (Variant const& variant : target.variants)
            if (variant.first <= end)  // within a variant, more tokens never need less
                found = std::max(found, placed(variant, std::min(end, variant.last)).back());
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

std::string Program::sizes() const {
    return "dim " + std::to_string(dim) + ", hidden " + std::to_string(hidden) + ", experts " +
           std::to_string(experts);
}

Variant const& variantFor(Target const& target, int64_t tokens) {
    for (Variant const& each : target.variants)
        if (each.first <= tokens && tokens <= each.last) return each;
    throw broken("nothing for " + std::to_string(tokens) + " tokens");
}

std::vector<int64_t> placed(Variant const& variant, int64_t tokens) {
    std::vector<int64_t> found{0};
    for (Buffer const& each : variant.buffers) {
        int64_t const end = found.back() + each.bytes.at(tokens);
        found.push_back((end + kAlignment - 1) / kAlignment * kAlignment);
    }
    return found;
}

}  // namespace moec
