// A program without Python and torch that runs random calls on every instruction set of this processor and compares
// them with double precision: what the sanitizers are run on. Usage: driver [calls] [seed].
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "hal_cpu_native.h"

int wrong_fields(int isa, int calls);  // of driver_fields.cpp

namespace {

std::mt19937_64 generator;

int64_t choose(std::initializer_list<int64_t> values) {
  return *(values.begin() + generator() % values.size());
}

float to_float(const unsigned char* p, int dtype) {
  if (dtype == HAL_FLOAT32) {
    float x;
    memcpy(&x, p, 4);
    return x;
  }
  uint16_t bits;
  memcpy(&bits, p, 2);
  if (dtype == HAL_BFLOAT16) {
    const uint32_t wide = uint32_t(bits) << 16;
    float x;
    memcpy(&x, &wide, 4);
    return x;
  }
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float x = exponent ? std::ldexp(1024.f + fraction, exponent - 25) : std::ldexp(float(fraction), -24);
  return bits >> 15 ? -x : x;
}

// A tensor in memory of exactly its size, so that a sanitizer sees every step beside it.
struct Tensor {
  std::vector<unsigned char> bytes;
  int64_t strides[3];
  Tensor(int64_t batch, int64_t heads, int64_t length, int64_t dim, int64_t more, int dtype) {
    const int64_t size = dtype == HAL_FLOAT32 ? 4 : 2, row = dim + more;
    bytes.resize((batch * heads * length * row - (batch * heads * length ? more : 0)) * size);
    strides[0] = heads * length * row, strides[1] = length * row, strides[2] = row;
    std::normal_distribution<float> normal;
    for (size_t i = 0; i + size <= bytes.size(); i += size) {
      const float x = normal(generator);
      uint32_t bits;
      memcpy(&bits, &x, 4);
      if (size == 4) memcpy(&bytes[i], &x, 4);
      else {
        uint16_t narrow = uint16_t(bits >> 16);
        if (dtype == HAL_FLOAT16) narrow = uint16_t((bits >> 16 & 0x8000) | (0x3000 + (generator() & 0xbff)));
        memcpy(&bytes[i], &narrow, 2);
      }
    }
  }
  float at(int64_t b, int64_t h, int64_t i, int64_t d, int dtype) const {
    return to_float(bytes.data() + (b * strides[0] + h * strides[1] + i * strides[2] + d) * (dtype == HAL_FLOAT32 ? 4 : 2), dtype);
  }
};

// Norm of the error of one random call over that of the exact output; negative where it was refused.
double run(int isa) {
  hal_attention call{};
  call.batch = choose({1, 2}), call.heads_kv = choose({1, 2, 3}), call.heads_q = call.heads_kv * choose({1, 2, 4});
  call.len_q = choose({1, 2, 5, 17, 33, 70}), call.len_k = choose({1, 2, 63, 64, 65, 130, 300});
  call.dim_qk = choose({8, 32, 40, 64}), call.dim_v = choose({8, 32, 64, 72});
  call.dtype = (int32_t)choose({0, 1, 2}), call.threads = (int32_t)choose({1, 2, 4}), call.isa = isa;
  call.band_low = choose({-HAL_NO_BOUND, -HAL_NO_BOUND, -5, -100});
  call.band_high = choose({HAL_NO_BOUND, HAL_NO_BOUND, 0, call.len_k - call.len_q});
  call.scale = 1.f / std::sqrt((float)call.dim_qk), call.softcap = choose({0, 0, 1}) ? 5.f : 0.f;
  const int64_t more = choose({0, 1, 8});
  Tensor q(call.batch, call.heads_q, call.len_q, call.dim_qk, more, call.dtype);
  Tensor k(call.batch, call.heads_kv, call.len_k, call.dim_qk, more, call.dtype);
  Tensor v(call.batch, call.heads_kv, call.len_k, call.dim_v, more, call.dtype);
  Tensor o(call.batch, call.heads_q, call.len_q, call.dim_v, more, call.dtype);
  std::vector<float> lse(call.batch * call.heads_q * call.len_q);
  std::vector<uint8_t> mask;
  if (choose({0, 1})) {
    const int64_t rows = choose({1, call.len_q});
    mask.resize(rows * call.len_k);
    for (auto& m : mask) m = generator() % 4 != 0;
    call.mask = mask.data();
    call.mask_strides[2] = rows > 1 ? call.len_k : 0;
    call.mask_strides[3] = 1;
  }
  std::vector<float> added(mask.size());
  if (!mask.empty() && choose({0, 1})) {
    for (size_t i = 0; i < added.size(); i++) added[i] = mask[i] ? float(generator() % 64) / 16 : -INFINITY;
    call.mask = added.data();
    call.mask_kind = HAL_MASK_FLOAT32;
  }
  std::vector<uint8_t> plan;
  if (choose({0, 1})) {
    call.block_q = choose({3, 16, 64}), call.block_k = choose({5, 16, 64, 100});
    const int64_t rows = (call.len_q + call.block_q - 1) / call.block_q, columns = (call.len_k + call.block_k - 1) / call.block_k;
    const int64_t heads = choose({1, call.heads_q});
    plan.resize(heads * rows * columns);
    for (auto& seen : plan) seen = generator() % 3 == 0;
    call.blocks = plan.data();
    call.block_strides[1] = heads > 1 ? rows * columns : 0;
    call.block_strides[2] = columns;
    call.block_strides[3] = 1;
  }
  call.query = q.bytes.data(), call.key = k.bytes.data(), call.value = v.bytes.data(), call.out = o.bytes.data();
  call.lse = lse.data();
  for (int i = 0; i < 3; i++)
    call.query_strides[i] = q.strides[i], call.key_strides[i] = k.strides[i], call.value_strides[i] = v.strides[i], call.out_strides[i] = o.strides[i];
  call.workspace_bytes = hal_cpu_native_workspace(&call);
  if (call.workspace_bytes < 0) return -1;
  call.workspace = aligned_alloc(64, (call.workspace_bytes + 63) / 64 * 64);
  const int status = hal_cpu_native_attention(&call);
  free(call.workspace);
  if (status) return -1;
  double error = 0, norm = 0;
  for (int64_t b = 0; b < call.batch; b++)
    for (int64_t h = 0; h < call.heads_q; h++)
      for (int64_t i = 0; i < call.len_q; i++) {
        const int64_t hk = h / (call.heads_q / call.heads_kv);
        std::vector<double> out(call.dim_v), weights(call.len_k);
        double sum = 0;
        for (int64_t j = 0; j < call.len_k; j++) {
          bool seen = j >= i + call.band_low && j <= i + call.band_high && (!call.mask || mask[i * call.mask_strides[2] + j]);
          if (call.blocks) seen &= call.blocks[h * call.block_strides[1] + i / call.block_q * call.block_strides[2] + j / call.block_k] != 0;
          double score = 0;
          for (int64_t d = 0; d < call.dim_qk; d++) score += (double)q.at(b, h, i, d, call.dtype) * k.at(b, hk, j, d, call.dtype);
          score *= call.scale;
          if (call.softcap > 0) score = call.softcap * std::tanh(score / call.softcap);
          if (call.mask_kind && seen) score += added[i * call.mask_strides[2] + j];
          sum += weights[j] = seen ? std::exp(score) : 0;
        }
        for (int64_t j = 0; j < call.len_k; j++)
          for (int64_t d = 0; d < call.dim_v; d++) out[d] += weights[j] * v.at(b, hk, j, d, call.dtype);
        for (int64_t d = 0; d < call.dim_v; d++) {
          const double want = sum > 0 ? out[d] / sum : 0, got = o.at(b, h, i, d, call.dtype);
          error += (want - got) * (want - got), norm += want * want;
        }
        const double got = lse[(b * call.heads_q + h) * call.len_q + i];
        if (sum > 0 ? !(std::fabs(got - std::log(sum)) < 1e-3) : got != -INFINITY) return 1e9;
      }
  const double bounds[] = {1e-5, 4e-3, 1e-3};
  return norm > 0 ? std::sqrt(error / norm) / bounds[call.dtype] : error > 0 ? 1e9 : 0;
}

}  // namespace

int main(int count, char** words) {
  const int calls = count > 1 ? atoi(words[1]) : 200;
  generator.seed(count > 2 ? atoi(words[2]) : 1);
  int wrong = 0, ran = 0;
  for (int isa = HAL_ISA_AVX2; isa <= hal_cpu_native_isa(); isa++) {
    wrong += wrong_fields(isa, calls);
    for (int i = 0; i < calls; i++) {
      const double share = run(isa);
      ran += share >= 0;
      if (share > 1) wrong++, printf("instruction set %d, call %d: %g times the bound\n", isa, i, share);
    }
  }
  hal_attention none{};
  if (hal_cpu_native_attention(nullptr) != HAL_NULL_POINTER || hal_cpu_native_attention(&none) == HAL_OK) wrong++;
  printf("%d calls, %d wrong\n", ran, wrong);
  return wrong != 0 || (hal_cpu_native_isa() && !ran);
}
