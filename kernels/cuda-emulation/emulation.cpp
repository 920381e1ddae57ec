// Fibers, barriers, warp exchanges and tensor-core instructions of the emulation; see emulation.h.
#include "emulation.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <setjmp.h>
#include <string>
#include <sys/mman.h>
#include <ucontext.h>
#include <vector>

namespace emulation {

thread_local Place place;

namespace {

constexpr int WARP = 32;
constexpr size_t STACK = 256 << 10;
// The largest thing lanes exchange: the fragments of an mma.
constexpr size_t EXCHANGE = 64;

struct Copy {
    void *to;
    const void *from;
    bool there;
};

enum class State { Ready, InWarp, AtBarrier, Done };

struct Fiber {
    ucontext_t context;
    jmp_buf at;
    bool begun = false;
    State state = State::Done;
    Place place;
    // Groups of copies that nobody has waited for; the last one is being filled.
    std::vector<std::vector<Copy>> copies;
};

struct Warp {
    int arrived = 0;
    size_t size = 0;
    int turn = 0;
    // Two, because a lane may come to the next exchange while another still reads this one.
    alignas(16) char exchange[2][WARP * EXCHANGE];
};

// One operating-system thread's machine: it runs a block at a time.
struct Machine {
    jmp_buf scheduler;
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<Warp> warps;
    const std::function<void()> *body = nullptr;
    Fiber *running = nullptr;
    uint64_t random = 0x9e3779b97f4a7c15;

    size_t below(size_t n) {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        return static_cast<size_t>(random % n);
    }
};

Machine &machine() {
    static thread_local Machine machine;
    return machine;
}

void pause() {
    Machine &m = machine();
    Fiber &self = *m.running;
    self.place = place;
    if (_setjmp(self.at) == 0) _longjmp(m.scheduler, 1);
    place = machine().running->place;
}

void trampoline() {
    for (;;) {
        (*machine().body)();
        machine().running->state = State::Done;
        pause();
    }
}

void resume(Fiber &fiber) {
    Machine &m = machine();
    m.running = &fiber;
    place = fiber.place;
    if (_setjmp(m.scheduler) == 0) {
        if (fiber.begun) _longjmp(fiber.at, 1);
        fiber.begun = true;
        setcontext(&fiber.context);
    }
}

Fiber &new_fiber(Machine &m) {
    auto fiber = std::make_unique<Fiber>();
    void *stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack == MAP_FAILED) fail("no memory for stacks");
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = stack;
    fiber->context.uc_stack.ss_size = STACK;
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, trampoline, 0);
    m.fibers.push_back(std::move(fiber));
    return *m.fibers.back();
}

// Runs a warp until none of its lanes can go on.
void run_warp(Machine &m, int warp) {
    int order[WARP];
    for (int i = 0; i < WARP; i++) order[i] = i;
    for (int i = WARP - 1; i > 0; i--) std::swap(order[i], order[m.below(static_cast<size_t>(i) + 1)]);
    for (bool any = true; any;) {
        any = false;
        for (int lane : order) {
            Fiber &fiber = *m.fibers[static_cast<size_t>(warp * WARP + lane)];
            if (fiber.state == State::Ready) {
                any = true;
                resume(fiber);
            }
        }
    }
}

void run_block(Machine &m, int threads) {
    size_t warps = static_cast<size_t>(threads) / WARP;
    auto count = [&](State state) {
        return std::count_if(m.fibers.begin(), m.fibers.begin() + threads, [&](auto &fiber) { return fiber->state == state; });
    };
    for (;;) {
        std::vector<size_t> order(warps);
        for (size_t i = 0; i < warps; i++) order[i] = i;
        for (size_t i = warps - 1; i > 0; i--) std::swap(order[i], order[m.below(i + 1)]);
        for (size_t warp : order) run_warp(m, static_cast<int>(warp));
        if (count(State::InWarp) > 0) fail("a warp's threads wait for one that is elsewhere");
        long waiting = count(State::AtBarrier);
        if (waiting == 0) return;
        if (waiting != threads) fail("a barrier that some threads of the block do not come to");
        for (int i = 0; i < threads; i++) m.fibers[static_cast<size_t>(i)]->state = State::Ready;
    }
}

} // namespace

void fail(const char *what) {
    fprintf(stderr, "emulated kernel: %s (block %d, %d; thread %d of %d)\n", what, place.block.x, place.block.y, place.thread,
            place.threads);
    abort();
}

void run(Size grid, int threads, size_t shared, const std::function<void()> &body) {
    Machine &m = machine();
    if (threads <= 0 || threads % WARP != 0 || threads > 1024) fail("a block whose size is not a multiple of a warp");
    while (m.fibers.size() < static_cast<size_t>(threads)) new_fiber(m);
    m.warps.assign(static_cast<size_t>(threads) / WARP, Warp());
    m.body = &body;
    // Exactly as long as was asked for, before a page that cannot be touched.
    size_t page = 4096;
    size_t used = (shared + page - 1) / page * page;
    char *memory = static_cast<char *>(mmap(nullptr, used + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (memory == MAP_FAILED) fail("no shared memory");
    mprotect(memory + used, page, PROT_NONE);
    size_t begin = (used - shared) / 16 * 16;
    for (int y = 0; y < grid.y; y++) {
        for (int x = 0; x < grid.x; x++) {
            memset(memory, 0xff, used);
            for (int i = 0; i < threads; i++) {
                Fiber &fiber = *m.fibers[static_cast<size_t>(i)];
                fiber.state = State::Ready;
                fiber.place = Place{i, threads, Size{x, y}, grid, memory + begin};
                fiber.copies.assign(1, {});
            }
            run_block(m, threads);
        }
    }
    munmap(memory, used + page);
}

void block_barrier() {
    machine().running->state = State::AtBarrier;
    pause();
}

const char *gather(const void *mine, size_t size) {
    Machine &m = machine();
    Fiber &self = *m.running;
    size_t lane = static_cast<size_t>(self.place.thread) % WARP;
    size_t first = static_cast<size_t>(self.place.thread) / WARP * WARP;
    Warp &warp = m.warps[first / WARP];
    if (size > EXCHANGE) fail("an exchange that is too large");
    if (warp.arrived > 0 && warp.size != size) fail("lanes of a warp at different exchanges");
    warp.size = size;
    const char *all = warp.exchange[warp.turn];
    memcpy(warp.exchange[warp.turn] + lane * size, mine, size);
    warp.arrived++;
    if (warp.arrived == WARP) {
        warp.arrived = 0;
        warp.turn ^= 1;
        for (size_t i = first; i < first + WARP; i++) {
            if (m.fibers[i]->state == State::InWarp) m.fibers[i]->state = State::Ready;
        }
    } else {
        self.state = State::InWarp;
        pause();
    }
    return all;
}

void copy_async(void *to, const void *from, bool there) {
    aligned(to, 16);
    if (there) aligned(from, 16);
    machine().running->copies.back().push_back(Copy{to, from, there});
}

void copy_async_commit() { machine().running->copies.emplace_back(); }

void copy_async_wait(int latest) {
    auto &copies = machine().running->copies;
    size_t committed = copies.size() - 1;
    size_t done = committed > static_cast<size_t>(latest) ? committed - static_cast<size_t>(latest) : 0;
    for (size_t group = 0; group < done; group++) {
        for (const Copy &copy : copies[group]) {
            if (copy.there) {
                memcpy(copy.to, copy.from, 16);
            } else {
                memset(copy.to, 0, 16);
            }
        }
    }
    copies.erase(copies.begin(), copies.begin() + static_cast<long>(done));
}

// PTX ISA, "Matrix Fragments for mma.m16n8k16": group = lane / 4, place = lane % 4.
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float (*value)(uint16_t)) {
    struct Fragments {
        uint32_t a[4], b[2];
    } mine;
    memcpy(mine.a, a, sizeof a);
    memcpy(mine.b, b, sizeof b);
    const auto *all = reinterpret_cast<const Fragments *>(gather(&mine, sizeof mine));
    int lane = machine().running->place.thread % WARP;
    auto half = [&](uint32_t pair, int which) { return value(static_cast<uint16_t>(pair >> (16 * which))); };
    for (int i = 0; i < 4; i++) {
        int row = lane / 4 + (i < 2 ? 0 : 8);
        int col = lane % 4 * 2 + i % 2;
        float sum = 0.0f;
        for (int k = 0; k < 16; k++) {
            // A: a0, a1 of register 0 are (group, 2·place + {0, 1}); register 1: row + 8; register 2: column + 8; register 3: both.
            int register_a = (row >= 8 ? 1 : 0) + (k >= 8 ? 2 : 0);
            float x = half(all[row % 8 * 4 + k % 8 / 2].a[register_a], k % 2);
            // B: register 0 is (2·place + {0, 1}, group); register 1: row + 8.
            float y = half(all[col * 4 + k % 8 / 2].b[k >= 8 ? 1 : 0], k % 2);
            sum += x * y;
        }
        c[i] += sum;
    }
}

// PTX ISA, "ldmatrix": lanes 8m … 8m + 7 name the rows of matrix m; lane i gets elements 2·(i % 4), + 1 of row i / 4 — or, transposed,
// of column i / 4.
void load_matrices(uint32_t (&r)[4], const void *row, bool transposed) {
    aligned(row, 16);
    const auto *rows = reinterpret_cast<const char *const *>(gather(&row, sizeof row));
    int lane = machine().running->place.thread % WARP;
    for (int m = 0; m < 4; m++) {
        uint16_t pair[2];
        for (int i = 0; i < 2; i++) {
            int other = lane % 4 * 2 + i;
            int from = transposed ? other : lane / 4;
            int at = transposed ? lane / 4 : other;
            memcpy(&pair[i], rows[m * 8 + from] + 2 * at, 2);
        }
        r[m] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
    }
}

float f16_value(uint16_t bits) {
    uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
    int exponent = bits >> 10 & 31;
    uint32_t mantissa = bits & 1023;
    float magnitude;
    if (exponent == 31) {
        magnitude = mantissa ? NAN : INFINITY;
    } else if (exponent == 0) {
        magnitude = ldexpf(static_cast<float>(mantissa), -24);
    } else {
        magnitude = ldexpf(static_cast<float>(mantissa + 1024), exponent - 25);
    }
    return sign ? -magnitude : magnitude;
}

uint16_t to_f16(float x) {
    uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    if (std::isnan(x)) return 0x7fff;
    double magnitude = fabs(static_cast<double>(x));
    if (magnitude >= 65520.0) return static_cast<uint16_t>(sign | 0x7c00);
    if (magnitude < 6.103515625e-05) return static_cast<uint16_t>(sign | static_cast<uint16_t>(nearbyint(magnitude * 16777216.0)));
    int exponent;
    double mantissa = nearbyint(frexp(magnitude, &exponent) * 2048.0);
    return static_cast<uint16_t>(sign | static_cast<uint16_t>((exponent + 13) * 1024 + static_cast<int>(mantissa)));
}

uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (std::isnan(x)) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

namespace {
struct Kernel {
    size_t size;
    int threads;
    Entry entry;
};
std::map<std::string, Kernel> &kernels() {
    static std::map<std::string, Kernel> kernels;
    return kernels;
}
} // namespace

Registration::Registration(const char *name, size_t size, int threads, Entry entry) { kernels()[name] = Kernel{size, threads, entry}; }

} // namespace emulation

// The kernel's place in the table and what its parameters occupy; null where there is none of that name.
extern "C" const void *quire_emulated_kernel(const char *name, size_t *size, int *threads) {
    auto found = emulation::kernels().find(name);
    if (found == emulation::kernels().end()) return nullptr;
    *size = found->second.size;
    *threads = found->second.threads;
    return &found->second;
}

extern "C" void quire_emulated_launch(const void *kernel, int x, int y, int threads, size_t shared, const void *params) {
    static_cast<const emulation::Kernel *>(kernel)->entry(emulation::Size{x, y}, threads, shared, params);
}

// The kernels themselves: one translation unit, so that no registration is left out by a linker.
#include "../src/cuda/attention.cu"
#include "../src/cuda/attention_plain.cu"
#include "../src/cuda/elementwise.cu"
#include "../src/cuda/expand.cu"
#include "../src/cuda/experts.cu"
#include "../src/cuda/heads.cu"
#include "../src/cuda/products_few.cu"
#include "../src/cuda/products_float.cu"
#include "../src/cuda/products_many.cu"
#include "../src/cuda/ranks.cu"
#include "../src/cuda/rows.cu"
#include "../src/cuda/sampling.cu"
