// What module.cpp and the kernels of every instruction set agree on.
#pragma once
#include <cstdint>

namespace erdfast {

enum class Dtype : int { fp32 = 0, bf16 = 1, fp16 = 2 };

struct Array {
  void* data = nullptr;  // null: absent
  Dtype dtype = Dtype::fp32;
};

// Where a batch's clean data and noise come from.
struct Source {
  Array x0;             // (batch, numel), or (batch, 2*numel) = [mean, std] when `moments`
  Array noise;          // (batch, numel); absent: drawn from the key
  bool moments = false;
  float moments_scale = 1.0f;
  uint64_t seed = 0;
  uint32_t stream = 0;
  const int64_t* sample_ids = nullptr;  // (batch,)
  int64_t batch = 0, numel = 0;
  int threads = 1;
};

struct AddNoise {
  Source source;
  Array out;            // (batch, numel)
  const float *alpha = nullptr, *sigma = nullptr;  // (batch,)
};

struct DiffusionLoss {
  Source source;
  Array pred;           // (batch, numel)
  const float *c_x = nullptr, *c_eps = nullptr, *w = nullptr;  // (batch,)
  float* sums = nullptr;  // (batch, 3): sum r^2, sum r*x0, sum r*eps with r = pred - y; may be null
  Array grad;           // grad_scale * d loss / d pred, (batch, numel); may be absent
  double grad_scale = 1.0;
};

#define ERDFAST_DECLARE(arch)                       \
  namespace arch {                                  \
  void add_noise(const AddNoise& op);               \
  void diffusion_loss(const DiffusionLoss& op);     \
  }
ERDFAST_DECLARE(baseline)
ERDFAST_DECLARE(avx2)
ERDFAST_DECLARE(avx512)
#undef ERDFAST_DECLARE

}  // namespace erdfast
