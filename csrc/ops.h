// What module.cpp and the kernels of every instruction set agree on.
#pragma once
#include <cstdint>

namespace erdfast {

enum class Dtype : int { fp32 = 0, bf16 = 1, fp16 = 2 };

// A batch of samples, `stride` numbers apart. `pixel` is 0 where the elements of a sample lie in order (channels first). Else it
// is channels-last: element c*pixels + p lies at p*pixel + c, where `pixel` is the number of channels or more.
struct Array {
  void* data = nullptr;  // null: absent
  Dtype dtype = Dtype::fp32;
  int64_t stride = 0, pixel = 0, pixels = 1;
};

// Where a batch's clean data and noise come from.
struct Source {
  Array x0;             // (batch, numel), or (batch, 2*numel) = [mean, std] when `moments`
  Array noise;          // (batch, numel); absent: drawn from the key
  bool moments = false;
  float moments_scale = 1.0f;
  uint64_t seed = 0;
  uint32_t stream = 0;
  const int64_t* sample_ids = nullptr;  // (batch,); null: 0, 1, ...
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
  float* loss = nullptr;  // 1/batch sum_b w_b/numel sum r^2; written where sums are
  Array grad;           // grad_scale * d loss / d pred, (batch, numel); may be absent
  double grad_scale = 1.0;
};

// One optimiser step over a list of tensors. Arrays of addresses have an entry per tensor, those of the averages one per
// average and tensor.
struct AdamwEma {
  int64_t tensors = 0, emas = 0, groups = 0;
  const int64_t *numel = nullptr, *group = nullptr;  // (tensors,)
  float *const *param = nullptr, *const *exp_avg = nullptr, *const *exp_avg_sq = nullptr, *const *step = nullptr;
  float* const* ema = nullptr;      // (emas, tensors)
  uint16_t* const* copy = nullptr;  // null: none
  Dtype copy_dtype = Dtype::bf16;
  const void* const* grad = nullptr;  // a null entry: this tensor is not updated, only averaged
  Dtype grad_dtype = Dtype::fp32;
  const double* settings = nullptr;  // lr, beta1, beta2, eps, weight_decay of each group; then the averages' 1 - decay
  const float *grad_scale = nullptr, *found_inf = nullptr, *norm = nullptr;  // null: 1, 0, no clipping
  double max_norm = 0.0;
  int threads = 1;
};

struct GradNorm {
  int64_t tensors = 0;
  const int64_t* numel = nullptr;
  const void* const* grad = nullptr;  // null entries do not count
  Dtype grad_dtype = Dtype::fp32;
  float* out = nullptr;
  int threads = 1;
};

#define ERDFAST_DECLARE(arch)                       \
  namespace arch {                                  \
  void add_noise(const AddNoise& op);               \
  void diffusion_loss(const DiffusionLoss& op);     \
  void adamw_ema(const AdamwEma& op);               \
  void grad_norm(const GradNorm& op);               \
  }
ERDFAST_DECLARE(baseline)
ERDFAST_DECLARE(avx2)
ERDFAST_DECLARE(avx512)
#undef ERDFAST_DECLARE

}  // namespace erdfast
