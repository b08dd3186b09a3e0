// The C interface of fields: checks, and the division of steps into tasks.
#include "fields.hpp"

#include <atomic>
#include <cstring>

#include "cpuid.hpp"
#include "hal_cpu_native.h"
#include "pool.hpp"

namespace hal {
namespace {

// Values below which a step is done before threads have met.
constexpr int64_t kFewest = 1 << 15;

int64_t up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

struct Grid {
  int64_t systems, height, width;
  int64_t stride() const { return up(width + 2, 16); }
  // One field in the workspace: rows whose neighbours across the border lie beside them.
  int64_t floats() const { return up(2 * kMargin + height * stride(), 16); }
  int64_t values() const { return height * width; }
  int64_t bands() const { return (height + kBandRows - 1) / kBandRows; }
};

const FieldKernels* kernels(int isa) {
  isa = isa == HAL_ISA_AUTO ? preferred_isa() : isa;
  if (isa < HAL_ISA_AVX2 || isa > best_isa()) return nullptr;
  return isa == HAL_ISA_AVX2 ? &avx2_field_kernels() : &avx512_field_kernels();
}

bool is_size(int64_t n) { return n > 0 && n < int64_t(1) << 31; }

// Calls task(index, slot) for every index below `tasks`; slots are below `threads`, and no two threads share one.
template <class Task>
void share(int64_t tasks, int64_t threads, const Task& task) {
  struct Work {
    const Task& task;
    int64_t tasks, threads;
    std::atomic<int64_t> next{0}, entered{0};
  } shared{task, tasks, threads};
  run_on_threads((int)(threads < tasks ? threads : tasks), [](void* data) {
    Work& work = *(Work*)data;
    const int64_t slot = work.entered.fetch_add(1);
    if (slot >= work.threads) return;
    for (int64_t n; (n = work.next.fetch_add(1)) < work.tasks;) work.task(n, slot);
  }, &shared);
}

int64_t workspace_bytes(int fields, const Grid& grid, int64_t threads) {
  const int64_t slots = threads < grid.systems ? threads : grid.systems;
  if (fields) return slots * 2 * fields * grid.floats() * 4;
  return threads * up(2 * (grid.width / 64 + 1) * 8, 64);
}

int check(const void* const* pointers, int count, const void* workspace, int64_t bytes, int fields, const Grid& grid, int64_t threads) {
  if (!is_size(grid.systems) || !is_size(grid.height) || !is_size(grid.width)) return HAL_BAD_SIZE;
  if (threads < 1 || threads > HAL_MOST_THREADS) return HAL_BAD_THREADS;
  for (int n = 0; n < count; n++)
    if (!pointers[n]) return HAL_NULL_POINTER;
  if (!workspace || (uintptr_t)workspace % 64) return HAL_NULL_POINTER;
  return bytes < workspace_bytes(fields, grid, threads) ? HAL_SMALL_WORKSPACE : HAL_OK;
}

// Steps of one system's fields: step(old, now, first, last) fills rows of the new fields. Between the first and the last
// step the fields lie in `memory`; the last one writes into the result.
template <int Fields, class Step>
void run_system(const float* const* in, float* const* out, float* memory, const Grid& grid, int64_t steps, int64_t threads, const Step& step) {
  Field sets[2][Fields], result[Fields];
  for (int f = 0; f < Fields; f++) {
    for (int n = 0; n < 2; n++) sets[n][f] = {memory + (2 * f + n) * grid.floats() + kMargin, grid.stride(), true};
    result[f] = {out[f], grid.width, false};
    for (int64_t y = 0; y < grid.height; y++) {
      float* row = sets[0][f].values + y * grid.stride();
      memcpy(row, in[f] + y * grid.width, grid.width * 4);
      row[-1] = row[grid.width - 1];
      row[grid.width] = row[0];
    }
  }
  for (int64_t n = 0; n < steps; n++) {
    const Field *old = sets[n % 2], *now = n + 1 < steps ? sets[(n + 1) % 2] : result;
    share(grid.bands(), threads, [&](int64_t band, int64_t) {
      const int64_t first = band * kBandRows, last = first + kBandRows;
      step(old, now, first, last < grid.height ? last : grid.height);
    });
  }
}

// Small systems are shared out whole, so that threads meet once; large ones one after the other, by bands of rows.
template <int Fields, class Step>
void run_systems(const float* const* in, float* const* out, float* memory, const Grid& grid, int64_t steps, int64_t threads, const Step& step) {
  const bool whole = grid.systems >= threads;
  const int64_t across = whole && grid.values() * grid.systems * steps >= kFewest ? threads : 1;
  const int64_t within = !whole && grid.values() >= kFewest ? threads : 1;
  share(grid.systems, across, [&](int64_t system, int64_t slot) {
    const float* from[Fields];
    float* to[Fields];
    for (int f = 0; f < Fields; f++) from[f] = in[f] + system * grid.values(), to[f] = out[f] + system * grid.values();
    run_system<Fields>(from, to, memory + slot * 2 * Fields * grid.floats(), grid, steps, within, step);
  });
}

}  // namespace
}  // namespace hal

extern "C" {

int64_t hal_cpu_native_fields_workspace(int32_t fields, int64_t systems, int64_t height, int64_t width, int32_t threads) {
  if (!hal::is_size(systems) || !hal::is_size(height) || !hal::is_size(width) || fields < 0 || fields > 2) return -HAL_BAD_SIZE;
  if (threads < 1 || threads > HAL_MOST_THREADS) return -HAL_BAD_THREADS;
  return hal::workspace_bytes(fields, {systems, height, width}, threads);
}

int hal_cpu_native_reaction_diffusion(const float* u, const float* v, float* new_u, float* new_v, void* workspace,
    int64_t workspace_bytes, int64_t systems, int64_t height, int64_t width, int64_t steps, const double* numbers,
    int32_t threads, int32_t isa) {
  const hal::Grid grid{systems, height, width};
  const void* const given[] = {u, v, new_u, new_v, numbers};
  if (const int status = hal::check(given, 5, workspace, workspace_bytes, 2, grid, threads)) return status;
  if (steps < 1) return HAL_BAD_SIZE;
  const hal::FieldKernels* kernels = hal::kernels(isa);
  if (!kernels) return HAL_BAD_ISA;
  const double dt = numbers[0], r = dt * numbers[3], s = r * numbers[4], rate_u = dt * numbers[1], rate_v = dt * numbers[2];
  // The nine-point average minus the middle is the (1, 2, 1) x (1, 2, 1) sum / 12, minus 4 / 3 of the middle.
  const hal::Reaction by{(float)(rate_u / 12), (float)(rate_v / 12), (float)(1 - 4. / 3 * rate_u + r),
                         (float)(1 - 4. / 3 * rate_v - s * numbers[5]), (float)r, (float)s, (float)(s * numbers[6]), r != 0};
  const float* const in[] = {u, v};
  float* const out[] = {new_u, new_v};
  hal::run_systems<2>(in, out, (float*)workspace, grid, steps, threads, [&](const hal::Field* old, const hal::Field* now, int64_t first, int64_t last) {
    kernels->reaction_diffusion(by, old, now, height, width, first, last);
  });
  return HAL_OK;
}

int hal_cpu_native_ricci(const float* phi, float* new_phi, void* workspace, int64_t workspace_bytes, int64_t systems,
    int64_t height, int64_t width, int64_t steps, double dt, int32_t threads, int32_t isa) {
  const hal::Grid grid{systems, height, width};
  const void* const given[] = {phi, new_phi};
  if (const int status = hal::check(given, 2, workspace, workspace_bytes, 1, grid, threads)) return status;
  if (steps < 1) return HAL_BAD_SIZE;
  const hal::FieldKernels* kernels = hal::kernels(isa);
  if (!kernels) return HAL_BAD_ISA;
  hal::run_systems<1>(&phi, &new_phi, (float*)workspace, grid, steps, threads, [&](const hal::Field* old, const hal::Field* now, int64_t first, int64_t last) {
    kernels->ricci((float)dt, old[0], now[0], height, width, first, last);
  });
  return HAL_OK;
}

int hal_cpu_native_euler(const float* field, const float* levels, int32_t* parts, void* workspace,
    int64_t workspace_bytes, int64_t systems, int64_t count, int64_t height, int64_t width, int32_t threads, int32_t isa) {
  const hal::Grid grid{systems, height, width};
  const void* const given[] = {field, levels, parts};
  if (const int status = hal::check(given, 3, workspace, workspace_bytes, 0, grid, threads)) return status;
  if (!hal::is_size(count)) return HAL_BAD_SIZE;
  const hal::FieldKernels* kernels = hal::kernels(isa);
  if (!kernels) return HAL_BAD_ISA;
  const int64_t rows = height + 1, bands = (rows + hal::kBandRows - 1) / hal::kBandRows, tasks = systems * count * bands;
  const int64_t line = hal::up(2 * (width / 64 + 1) * 8, 64);
  hal::share(tasks, grid.values() * systems * count < hal::kFewest ? 1 : threads, [&](int64_t task, int64_t slot) {
    const int64_t first = task % bands * hal::kBandRows, last = first + hal::kBandRows;
    const int64_t system = task / bands / count, level = task / bands % count;
    kernels->euler(field + system * grid.values(), levels[level], parts + (system * count + level) * rows,
                   (uint64_t*)((char*)workspace + slot * line), height, width, first, last < rows ? last : rows);
  });
  return HAL_OK;
}

}  // extern "C"
