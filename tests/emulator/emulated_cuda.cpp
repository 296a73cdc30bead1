// The scheduler of the emulated GPU: one fiber per thread, blocks one after another. emulated_cuda.h says what it
// checks.

#include "emulated_cuda.h"

#include <link.h>
#include <sys/mman.h>
#include <torch/headeronly/util/Exception.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define CASM_FAST_ASAN 1
#else
#define CASM_FAST_ASAN 0
#endif

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace casm_fast::emulated {

const Identity* identity = nullptr;

namespace {

// ---------------------------------------------------------------- fibers
// Room for AddressSanitizer's frames, which are several times larger; pages that nobody touches cost nothing.
constexpr size_t kStackBytes = 256 << 10;

#if defined(__x86_64__)
// Saves what a call must preserve, stores the stack pointer at `from`, and goes on where `to` was stored. ucontext
// would enter the kernel twice per switch for the signal mask.
extern "C" __attribute__((visibility("hidden"))) void casm_fast_switch(void** from, void* to);
asm(R"(
  .text
  .globl casm_fast_switch
  .hidden casm_fast_switch
  .type casm_fast_switch, @function
casm_fast_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size casm_fast_switch, .-casm_fast_switch
)");
#endif

// Something that can run: a fiber, or the caller of launch().
struct Context {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t registers;
#endif
  char* stack = nullptr;  // lowest address
  size_t stack_bytes = 0;
};

// The stacks of fibers, each under a page that must not be touched, kept for the life of the process.
class Stacks {
 public:
  char* take() {
    if (free_.empty()) grow();
    char* stack = free_.back();
    free_.pop_back();
#if CASM_FAST_ASAN
    __asan_unpoison_memory_region(stack, kStackBytes);  // the last fiber's frames never returned
#endif
    return stack;
  }
  void give_back(char* stack) { free_.push_back(stack); }

 private:
  void grow() {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    void* memory = mmap(nullptr, kStackBytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    STD_TORCH_CHECK(memory != MAP_FAILED, "emulated CUDA: no memory for the stack of a thread");
    mprotect(memory, page, PROT_NONE);
    free_.push_back(static_cast<char*>(memory) + page);
  }
  std::vector<char*> free_;
};

// ---------------------------------------------------------------- the state of the block that runs
enum class State { fresh, ready, at_barrier, in_warp, exited };

// One warp operation that lanes are waiting in, or reading the results of.
struct Rendezvous {
  Meeting meeting;
  unsigned mask, arrived = 0, reading = 0;
  Where where;
  Brought brought;
};

struct Thread {
  Identity identity;
  State state = State::fresh;
  Where where{"", 0};
  Rendezvous* reading = nullptr;  // results that this lane may still look at
  Context context;
  unsigned warp = 0;
};

struct Warp {
  unsigned exists = 0, exited = 0;  // lanes
  std::vector<std::unique_ptr<Rendezvous>> meetings;
};

class Draw {  // splitmix64
 public:
  explicit Draw(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  uint64_t below(uint64_t n) { return static_cast<uint64_t>(static_cast<unsigned __int128>(next()) * n >> 64); }

 private:
  uint64_t state_;
};

struct Gpu {
  std::mutex one_launch_at_a_time;
  Stacks stacks;
  Draw draw{0};
  Context caller;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<Thread*> ready;  // fresh and ready threads, in no order
  Thread* running = nullptr;
  unsigned waiting = 0, exited = 0;  // at the barrier; left the kernel
  int voted = 0, last_vote = 0;      // at this barrier so far; at the last one
  Where barrier{"", 0};
  std::unique_ptr<char, decltype(&std::free)> shared{nullptr, &std::free};
  void (*run)(void*) = nullptr;
  void* arguments = nullptr;
  std::string error;
};
Gpu gpu;

thread_local char in_the_shared_segment;  // so that the segment exists also where no kernel has static shared memory

// The static shared memory of every kernel: the thread_local segment of this library, which holds nothing else.
struct Segment {
  const void* inside;
  char* begin = nullptr;
  size_t bytes = 0;
};

Segment shared_segment() {
  Segment segment{&in_the_shared_segment};
  dl_iterate_phdr(
      [](dl_phdr_info* library, size_t, void* opaque) {
        Segment& found = *static_cast<Segment*>(opaque);
        for (int i = 0; i < library->dlpi_phnum; ++i) {
          if (library->dlpi_phdr[i].p_type != PT_TLS || !library->dlpi_tls_data) continue;
          char* begin = static_cast<char*>(library->dlpi_tls_data);
          const size_t bytes = library->dlpi_phdr[i].p_memsz;
          if (found.inside >= begin && found.inside < begin + bytes) found.begin = begin, found.bytes = bytes;
        }
        return 0;
      },
      &segment);
  STD_TORCH_CHECK(segment.begin, "emulated CUDA: the segment of static shared memory was not found");
  return segment;
}

std::string text(uint3 v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

std::string text(Where where) {
  const std::string file = where.file;
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line);
}

std::string hex(unsigned mask) {
  char digits[16];
  std::snprintf(digits, sizeof digits, "0x%08x", mask);
  return digits;
}

// ---------------------------------------------------------------- switching
void fiber_main();

// Leaves `from`, for good if `from_ends`, and goes on with `to`.
void switch_context(Context& from, Context& to, bool from_ends = false) {
#if CASM_FAST_ASAN
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(from_ends ? nullptr : &fake_stack, to.stack, to.stack_bytes);
#endif
#if defined(__x86_64__)
  casm_fast_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.registers, &to.registers);
#endif
#if CASM_FAST_ASAN
  // Only the caller of launch() has a stack that ASan must tell us about.
  const void* bottom = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(fake_stack, &bottom, &bytes);
#endif
}

void prepare(Thread& thread) {
  Context& context = thread.context;
  context.stack = gpu.stacks.take();
  context.stack_bytes = kStackBytes;
#if defined(__x86_64__)
  // As after a call: six saved registers below the address to return to, and an aligned stack above.
  void** top = reinterpret_cast<void**>(context.stack + kStackBytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.stack_pointer = top;
#else
  getcontext(&context.registers);
  context.registers.uc_stack.ss_sp = context.stack;
  context.registers.uc_stack.ss_size = kStackBytes;
  context.registers.uc_link = nullptr;
  makecontext(&context.registers, &fiber_main, 0);
#endif
}

Thread* take_ready() {
  if (gpu.ready.empty()) return nullptr;
  std::swap(gpu.ready[gpu.draw.below(gpu.ready.size())], gpu.ready.back());
  Thread* thread = gpu.ready.back();
  gpu.ready.pop_back();
  return thread;
}

void resume(Context& from, Thread& next) {
  if (next.state == State::fresh) prepare(next);
  next.state = State::ready;
  gpu.running = &next;
  identity = &next.identity;
  switch_context(from, next.context);
}

// Lets another thread run until this one is ready again and drawn.
void give_way() {
  Thread& self = *gpu.running;
  Thread* next = take_ready();
  if (next == &self) {
    self.state = State::ready;
    return;
  }
  if (next)
    resume(self.context, *next);
  else
    switch_context(self.context, gpu.caller);  // nobody can go on: run_block() reports it
}

void wake(Thread& thread) {
  thread.state = State::ready;
  gpu.ready.push_back(&thread);
}

[[noreturn]] void stop(const std::string& what) {
  const Thread& self = *gpu.running;
  gpu.error = "emulated CUDA: " + what + " (block " + text(self.identity.block) + ", thread " +
              text(self.identity.thread) + ")";
  switch_context(gpu.running->context, gpu.caller, true);
  std::abort();  // never resumed
}

void fiber_main() {
#if CASM_FAST_ASAN
  const void* bottom = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (!gpu.caller.stack)
    gpu.caller.stack = const_cast<char*>(static_cast<const char*>(bottom)), gpu.caller.stack_bytes = bytes;
#endif
  gpu.run(gpu.arguments);
  Thread& self = *gpu.running;
  if (gpu.waiting > 0)
    stop("a thread left the kernel while " + std::to_string(gpu.waiting) + " wait at the barrier " + text(gpu.barrier));
  self.state = State::exited;
  ++gpu.exited;
  Warp& warp = gpu.warps[self.warp];
  warp.exited |= 1u << self.identity.lane;
  for (const auto& meeting : warp.meetings)
    if (meeting->arrived != meeting->mask && meeting->mask >> self.identity.lane & 1)
      stop("a thread left the kernel while its warp waits for it at " + text(meeting->where));
  switch_context(self.context, gpu.caller, true);  // the caller reuses the stack
}

// Why nobody can go on.
std::string deadlock() {
  std::string report = "emulated CUDA: no thread of the block can go on: ";
  int told = 0;
  for (const Thread& thread : gpu.threads) {
    if (thread.state == State::exited || told == 4) continue;
    report += (told++ ? ", " : "") + std::string("thread ") + text(thread.identity.thread) + " waits at " +
              (thread.state == State::at_barrier ? "the barrier " : "the warp operation ") + text(thread.where);
  }
  return report;
}

void run_block(const Segment& segment, uint3 block, dim3 grid, dim3 size, int64_t shared_bytes) {
  if (shared_bytes > 0) std::memset(gpu.shared.get(), 0xff, static_cast<size_t>(shared_bytes));
  std::memset(segment.begin, 0xff, segment.bytes);
  gpu.ready.clear();
  gpu.waiting = gpu.exited = 0;
  gpu.voted = gpu.last_vote = 0;
  const unsigned count = size.x * size.y * size.z;
  gpu.threads.resize(count);
  gpu.warps.resize((count + kWarp - 1) / kWarp);
  for (Warp& warp : gpu.warps) {
    warp.exists = warp.exited = 0;
    warp.meetings.clear();
  }
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = gpu.threads[i];
    thread.identity = {{i % size.x, i / size.x % size.y, i / (size.x * size.y)}, block, size, grid, i % kWarp};
    thread.state = State::fresh;
    thread.reading = nullptr;
    thread.warp = i / kWarp;
    gpu.warps[thread.warp].exists |= 1u << i % kWarp;
    gpu.ready.push_back(&thread);
  }
  while (Thread* next = take_ready()) {
    resume(gpu.caller, *next);
    // A fiber came back: it has left the kernel, nobody can go on, or something is wrong.
    if (!gpu.error.empty()) return;
    if (gpu.running->state == State::exited) gpu.stacks.give_back(gpu.running->context.stack);
  }
  if (gpu.exited != count) gpu.error = deadlock();
}

}  // namespace

// ---------------------------------------------------------------- what kernels call
void* dynamic_shared_memory() { return gpu.shared.get(); }

void fail(const char* what, Where where) { stop(std::string(what) + " at " + text(where)); }

void perhaps_give_way() {
  if (gpu.draw.next() & 3) return;
  wake(*gpu.running);
  give_way();
}

int block_barrier(bool predicate, Where where) {
  Thread& self = *gpu.running;
  if (gpu.exited > 0)
    stop("a thread comes to the barrier " + text(where) + " after " + std::to_string(gpu.exited) +
         " of its block left the kernel");
  if (gpu.waiting == 0) {
    gpu.barrier = where;
    gpu.voted = 0;
  }
  if (where.line != gpu.barrier.line || std::strcmp(where.file, gpu.barrier.file) != 0)
    stop("threads of one block wait at different barriers, " + text(gpu.barrier) + " and " + text(where));
  self.where = where;
  self.state = State::at_barrier;
  gpu.voted += predicate;
  if (++gpu.waiting == gpu.threads.size()) {
    gpu.last_vote = gpu.voted;
    gpu.waiting = 0;
    for (Thread& thread : gpu.threads) wake(thread);
  }
  give_way();
  return gpu.last_vote;  // the next barrier opens only after every thread has come past this line
}

const Brought& meet(Meeting meeting, unsigned mask, uint64_t value, Where where) {
  Thread& self = *gpu.running;
  Warp& warp = gpu.warps[self.warp];
  const unsigned own = 1u << self.identity.lane;
  if (!(mask & own)) stop("the mask " + hex(mask) + " of a warp operation leaves out its caller at " + text(where));
  if (const unsigned missing = mask & (~warp.exists | warp.exited))
    stop("the mask " + hex(mask) + " of a warp operation names lanes that are not there, " + hex(missing) + ", at " +
         text(where));
  if (Rendezvous* last = std::exchange(self.reading, nullptr); last && (last->reading &= ~own) == 0)
    std::erase_if(warp.meetings, [&](const auto& other) { return other.get() == last; });

  Rendezvous* here = nullptr;
  for (const auto& other : warp.meetings) {
    if (other->arrived == other->mask || !(other->mask & mask)) continue;
    if (other->mask != mask)
      stop("lanes of one warp wait with different masks, " + hex(other->mask) + " at " + text(other->where) + " and " +
           hex(mask) + " at " + text(where));
    if (other->meeting != meeting)
      stop("lanes of one warp wait in different operations, at " + text(other->where) + " and at " + text(where));
    here = other.get();
  }
  if (!here) {
    warp.meetings.push_back(std::make_unique<Rendezvous>());
    here = warp.meetings.back().get();
    here->meeting = meeting;
    here->mask = mask;
    here->where = where;
  }
  here->arrived |= own;
  here->reading |= own;
  here->brought.value[self.identity.lane] = value;
  self.reading = here;
  self.where = where;
  if (here->arrived == mask) {
    Thread* first = &gpu.threads[self.warp * kWarp];
    for (unsigned lanes = mask & ~own; lanes; lanes &= lanes - 1) wake(first[std::countr_zero(lanes)]);
    perhaps_give_way();
  } else {
    self.state = State::in_warp;
    give_way();
  }
  return here->brought;
}

void run_grid(dim3 grid, dim3 block, int64_t shared_bytes, void (*run)(void*), void* arguments) {
  const uint64_t count = static_cast<uint64_t>(block.x) * block.y * block.z;
  STD_TORCH_CHECK(count >= 1 && count <= 1024 && block.z <= 64,
                  "emulated CUDA: expected 1 to 1024 threads per block, got ", count);
  STD_TORCH_CHECK(grid.x <= 0x7fffffffu && grid.y <= 65535 && grid.z <= 65535,
                  "emulated CUDA: the grid is too large: ", grid.x, " x ", grid.y, " x ", grid.z);
  STD_TORCH_CHECK(shared_bytes >= 0 && shared_bytes <= kMaxSharedBytes,
                  "emulated CUDA: too much shared memory: ", shared_bytes);

  const std::lock_guard lock(gpu.one_launch_at_a_time);
  const char* seed = std::getenv("CASM_FAST_EMULATOR_SEED");
  gpu.draw = Draw(seed ? std::strtoull(seed, nullptr, 10) : 0);
  gpu.run = run;
  gpu.arguments = arguments;
  gpu.error.clear();
  gpu.caller = Context();
  gpu.shared.reset(shared_bytes > 0 ? static_cast<char*>(std::malloc(static_cast<size_t>(shared_bytes))) : nullptr);
  const Segment segment = shared_segment();

  // The blocks, too, come in a drawn order.
  const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  std::vector<uint64_t> order(blocks);
  std::iota(order.begin(), order.end(), uint64_t{0});
  for (uint64_t i = blocks; i > 1; --i) std::swap(order[i - 1], order[gpu.draw.below(i)]);
  for (const uint64_t i : order) {
    const uint3 index{static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                      static_cast<unsigned>(i / (static_cast<uint64_t>(grid.x) * grid.y))};
    run_block(segment, index, grid, block, shared_bytes);
    if (!gpu.error.empty()) break;
  }
  if (!gpu.error.empty()) {
    for (const Thread& thread : gpu.threads)  // abandoned fibers
      if (thread.state != State::fresh && thread.state != State::exited) gpu.stacks.give_back(thread.context.stack);
    STD_TORCH_CHECK(false, gpu.error);
  }
}

}  // namespace casm_fast::emulated
