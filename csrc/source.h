// Walks a batch in blocks of 4*LANES elements and hands each block's x0 and eps to a visitor.
#pragma once
#include <algorithm>
#include <vector>

#include "element.h"

namespace erdfast::ERDFAST_ARCH {

constexpr uint64_t POSTERIOR_DOMAIN = 0x5851F42D4C957F2Dull;  // erdfast.philox.DOMAINS["posterior"]
constexpr int64_t SERIAL_ELEMENTS = 16384;  // 25 microseconds of work: waking a second thread costs as much
constexpr int64_t LANES_PER_TASK = 1024;  // 4096 elements: 16 KB of fp32 an array, many tasks for every thread

// Offset and count of part j of the block that starts at lane q.
struct Layout {
  int64_t numel, quarter;
  bool contiguous;  // explicit noise: elements need no lanes, so a block is 4*LANES neighbours and memory streams

  explicit Layout(const Source& source)
      : numel(source.numel),
        quarter((source.numel + 3) / 4),
        contiguous(source.noise.data != nullptr && !source.moments) {}

  int64_t step() const { return contiguous ? LANES : quarter; }  // from part to part

  int64_t offset(int64_t q, int j) const { return (contiguous ? 4 * q : q) + j * step(); }

  int count(int64_t q, int j) const {
    const int64_t left = contiguous ? numel - offset(q, j) : std::min(quarter, numel - j * quarter) - q;
    return static_cast<int>(std::clamp<int64_t>(left, 0, LANES));
  }

  bool whole(int64_t q) const { return count(q, 3) == LANES; }  // no later part has more
};

// The four parts of a block: lane i of part j is at data[j*step + i].
template <class T>
struct Parts {
  T* data;
  int64_t step;
};

using Buffer = float[4][LANES];

// Where an array's whole float32 lanes are; else as `load` puts them into `buffer`, missing lanes 0.
inline Parts<const float> read_parts(const Array& array, const Layout& layout, int64_t b, int64_t q, Buffer& buffer) {
  if (array.dtype == Dtype::fp32 && !array.pixel && layout.whole(q))
    return {static_cast<const float*>(array.data) + b * array.stride + layout.offset(q, 0), layout.step()};
  for (int j = 0; j < 4; ++j) load(array, b, layout.offset(q, j), layout.count(q, j), buffer[j]);
  return {buffer[0], LANES};
}

// Where results may be written: straight into the array if it holds them all so, else into `buffer`, for `finish`.
inline Parts<float> target_parts(const Array& array, const Layout& layout, int64_t b, int64_t q, Buffer& buffer) {
  if (array.data && array.dtype == Dtype::fp32 && !array.pixel && layout.whole(q))
    return {static_cast<float*>(array.data) + b * array.stride + layout.offset(q, 0), layout.step()};
  return {buffer[0], LANES};
}

inline void finish(const Array& array, const Layout& layout, int64_t b, int64_t q, const Buffer& buffer, bool buffered) {
  for (int j = 0; buffered && array.data && j < 4; ++j)
    store(array, b, layout.offset(q, j), layout.count(q, j), buffer[j]);
}

struct Block {
  Parts<const float> x0, eps;
  alignas(64) Buffer x0_buffer;
  alignas(64) Buffer eps_buffer;
};

// Of the lanes that parts of a block do not have, drawn numbers are cleared, so that sums may run over all.
inline void draw(const Source& source, uint64_t domain, const Layout& layout, int64_t b, int64_t q, Buffer& normals) {
  const uint64_t id = static_cast<uint64_t>(source.sample_ids ? source.sample_ids[b] : b);
  const int lanes = static_cast<int>(std::min<int64_t>(layout.quarter - q, LANES));
  NoiseStream{source.seed ^ domain, id, source.stream}.fill(static_cast<uint32_t>(q), lanes, normals);
  for (int j = 0; j < 4; ++j)
    for (int i = layout.count(q, j); i < LANES; ++i) normals[j][i] = 0.0f;
}

inline void read_block(const Source& source, const Layout& layout, int64_t b, int64_t q, Block& block) {
  if (source.noise.data) {
    block.eps = read_parts(source.noise, layout, b, q, block.eps_buffer);
  } else {
    draw(source, 0, layout, b, q, block.eps_buffer);
    block.eps = {block.eps_buffer[0], LANES};
  }
  if (!source.moments) {
    block.x0 = read_parts(source.x0, layout, b, q, block.x0_buffer);
    return;
  }
  alignas(64) Buffer eta;
  draw(source, POSTERIOR_DOMAIN, layout, b, q, eta);
  for (int j = 0; j < 4; ++j) {
    alignas(64) float mean[LANES];
    alignas(64) float std[LANES];
    load(source.x0, b, layout.offset(q, j), layout.count(q, j), mean);
    load(source.x0, b, layout.offset(q, j) + source.numel, layout.count(q, j), std);
    float* x0 = block.x0_buffer[j];
#pragma omp simd simdlen(16)
    for (int i = 0; i < LANES; ++i) x0[i] = source.moments_scale * (mean[i] + std[i] * eta[j][i]);
  }
  block.x0 = {block.x0_buffer[0], LANES};
}

inline int64_t tasks_per_sample(const Layout& layout) {
  return (layout.quarter + LANES_PER_TASK - 1) / LANES_PER_TASK;
}

// visit(task, b, q_begin, q_end) for every task of the batch, in parallel. The partition depends on the size of a sample
// alone, so results do not depend on the number of threads.
template <class Visit>
inline void for_each_task(const Source& source, const Layout& layout, Visit visit) {
  const int64_t per_sample = tasks_per_sample(layout), tasks = source.batch * per_sample;
  const auto run = [&](int64_t task) {
    const int64_t begin = task % per_sample * LANES_PER_TASK;
    visit(task, task / per_sample, begin, std::min(begin + LANES_PER_TASK, layout.quarter));
  };
  if (source.threads < 2 || source.batch * source.numel < SERIAL_ELEMENTS) {
    for (int64_t task = 0; task < tasks; ++task) run(task);
    return;
  }
#pragma omp parallel for schedule(dynamic, 8) num_threads(source.threads)  // a core may be busy elsewhere
  for (int64_t task = 0; task < tasks; ++task) run(task);
}

}  // namespace erdfast::ERDFAST_ARCH
