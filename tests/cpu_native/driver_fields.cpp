// Random fields for the sanitizers, beside driver.cpp: results of one thread and of several must be the same, and those
// of one step those of the formulas in double precision.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "hal_cpu_native.h"

namespace {

std::mt19937_64 generator(7);

int64_t choose(std::initializer_list<int64_t> values) { return *(values.begin() + generator() % values.size()); }

struct Room {
  void* memory;
  int64_t bytes;
  Room(int fields, int64_t systems, int64_t height, int64_t width, int threads) {
    bytes = hal_cpu_native_fields_workspace(fields, systems, height, width, threads);
    memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
  }
  ~Room() { free(memory); }
};

bool run(int isa) {
  const int64_t systems = choose({1, 2, 5}), height = choose({1, 2, 7, 33, 190}), width = choose({1, 5, 8, 17, 64, 200}), steps = choose({1, 2, 6});
  const int64_t size = systems * height * width, levels = 2;
  std::vector<float> u(size), v(size), cut{-0.2f, 0.2f};
  std::normal_distribution<float> normal(0.f, 0.4f);  // which a few steps do not blow up
  for (auto* field : {&u, &v})
    for (float& x : *field) x = normal(generator);
  const double numbers[7] = {0.2, 0.7, 1.3, 0.8, 0.5, 0.9, 0.3}, dt = 1e-4;
  std::vector<float> new_u[2], new_v[2], phi[2];
  std::vector<int32_t> parts[2];
  for (int n = 0; n < 2; n++) {
    const int threads = n ? (int)choose({2, 3, 8}) : 1;
    new_u[n].resize(size), new_v[n].resize(size), phi[n].resize(size), parts[n].resize(systems * levels * (height + 1));
    const Room two(2, systems, height, width, threads), one(1, systems, height, width, threads), none(0, systems, height, width, threads);
    int wrong = hal_cpu_native_reaction_diffusion(u.data(), v.data(), new_u[n].data(), new_v[n].data(), two.memory, two.bytes, systems, height, width, steps, numbers, threads, isa);
    wrong |= hal_cpu_native_ricci(u.data(), phi[n].data(), one.memory, one.bytes, systems, height, width, steps, dt, threads, isa);
    wrong |= hal_cpu_native_euler(u.data(), cut.data(), parts[n].data(), none.memory, none.bytes, systems, levels, height, width, threads, isa);
    if (wrong) return false;
  }
  if (new_u[0] != new_u[1] || new_v[0] != new_v[1] || phi[0] != phi[1] || parts[0] != parts[1]) return false;
  if (steps > 1) return true;
  for (int64_t at = 0; at < size; at++) {
    const int64_t base = at / (height * width) * height * width, y = at / width % height, x = at % width;
    auto near = [&](const std::vector<float>& f, int64_t dy, int64_t dx) {
      return (double)f[base + (y + dy + height) % height * width + (x + dx + width) % width];
    };
    double spread = -near(u, 0, 0), laplacian = -4 * near(u, 0, 0);
    for (int64_t dy = -1; dy <= 1; dy++)
      for (int64_t dx = -1; dx <= 1; dx++) {
        if (dy || dx) spread += near(u, dy, dx) / (dy && dx ? 12 : 6);
        if ((dy == 0) != (dx == 0)) laplacian += near(u, dy, dx);
      }
    const double a = u[at], b = v[at], want = a + numbers[0] * (numbers[1] * spread + numbers[3] * (a - a * a * a - b));
    const double flowed = a + dt * std::exp(-2 * a) * laplacian;
    if (std::fabs(new_u[0][at] - want) > 1e-5 * (1 + std::fabs(want)) || std::fabs(phi[0][at] - flowed) > 1e-5 * (1 + std::fabs(flowed))) return false;
  }
  return true;
}

}  // namespace

// How many of `calls` draws were wrong on an instruction set.
int wrong_fields(int isa, int calls) {
  int wrong = 0;
  for (int i = 0; i < calls; i++)
    if (!run(isa)) wrong++, printf("instruction set %d, fields %d\n", isa, i);
  return wrong;
}
