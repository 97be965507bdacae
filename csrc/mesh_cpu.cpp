// Pictures of triangle meshes, on the CPU: normals of the vertices, and a rasteriser with a depth buffer. All frames of
// a clip show the same triangles, with the vertices elsewhere. It is compiled once: the bits are those of every machine.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "checks.h"

namespace avppc {
namespace {

constexpr int64_t STEPS = 256;          // of a sample's part of a pixel: vertices are moved to this grid, so that coverage is exact
constexpr float REACH = 1 << 16;        // pixels from the picture's corner that a vertex may be at
constexpr int64_t FRAMES_A_THREAD = 2;  // a frame costs some hundred microseconds, waking a thread 5

struct Mesh {
  int64_t frames, vertices, triangles;
  const float* places;     // [frames, vertices, 3]
  const int64_t* corners;  // [triangles, 3]
};

Mesh check_mesh(const Tensor& vertices, const Tensor& triangles) {
  check_dtype("vertices", vertices, ScalarType::Float);
  check_dim("vertices", vertices, 3);
  check_contiguous("vertices", vertices);
  AVPPC_CHECK(vertices.size(2) == 3, "vertices must have 3 coordinates, got ", vertices.size(2));
  check_dtype("triangles", triangles, ScalarType::Long);
  check_dim("triangles", triangles, 2);
  check_contiguous("triangles", triangles);
  AVPPC_CHECK(triangles.size(1) == 3, "triangles must have 3 corners, got ", triangles.size(1));
  const Mesh mesh{vertices.size(0), vertices.size(1), triangles.size(0), vertices.const_data_ptr<float>(),
                  triangles.const_data_ptr<int64_t>()};
  for (int64_t i = 0; i < 3 * mesh.triangles; ++i) {
    AVPPC_CHECK(mesh.corners[i] >= 0 && mesh.corners[i] < mesh.vertices, "triangles must be of vertices 0 to ",
                mesh.vertices - 1, ", got ", mesh.corners[i]);
  }
  return mesh;
}

// The mean direction of the triangles around each vertex, weighted by their areas: [T, V, 3], of length 1 (0 where the
// triangles cancel out, or where there are none).
Tensor vertex_normals(const Tensor& vertices, const Tensor& triangles) {
  const Mesh mesh = check_mesh(vertices, triangles);
  Tensor out = torch::stable::new_zeros(vertices, vertices.sizes());
  float* normals = out.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, mesh.frames, FRAMES_A_THREAD, [&](int64_t begin, int64_t end) {
    for (int64_t frame = begin; frame < end; ++frame) {
      const float* places = mesh.places + frame * mesh.vertices * 3;
      float* sums = normals + frame * mesh.vertices * 3;
      for (int64_t triangle = 0; triangle < mesh.triangles; ++triangle) {
        const int64_t* corner = mesh.corners + triangle * 3;
        const float *a = places + corner[0] * 3, *b = places + corner[1] * 3, *c = places + corner[2] * 3;
        const float u[3] = {b[0] - a[0], b[1] - a[1], b[2] - a[2]}, v[3] = {c[0] - a[0], c[1] - a[1], c[2] - a[2]};
        const float cross[3] = {u[1] * v[2] - u[2] * v[1], u[2] * v[0] - u[0] * v[2], u[0] * v[1] - u[1] * v[0]};
        for (int64_t k = 0; k < 3; ++k) {
          for (int64_t axis = 0; axis < 3; ++axis) sums[corner[k] * 3 + axis] += cross[axis];
        }
      }
      for (float* n = sums; n < sums + mesh.vertices * 3; n += 3) {
        const float length = std::sqrt(n[0] * n[0] + n[1] * n[1] + n[2] * n[2]);
        const float factor = length > 0 ? 1 / length : 0;
        for (int64_t axis = 0; axis < 3; ++axis) n[axis] *= factor;
      }
    }
  });
  return out;
}

// Where the samples of a frame are drawn, over a background [height / samples, width / samples, channels].
struct Canvas {
  int64_t height, width, channels, samples;
  std::vector<float> depth;   // [height, width]
  std::vector<float> values;  // [height, width, channels]
  std::vector<float> blank;   // the background as such values
  Canvas(const float* background, int64_t rows, int64_t columns, int64_t channels, int64_t samples)
      : height(rows * samples), width(columns * samples), channels(channels), samples(samples), depth(height * width) {
    blank.reserve(height * width * channels);
    for (int64_t i = 0; i < height * width; ++i) {
      const float* pixel = background + (i / width / samples * columns + i % width / samples) * channels;
      blank.insert(blank.end(), pixel, pixel + channels);
    }
  }
  void clear() {
    std::fill(depth.begin(), depth.end(), std::numeric_limits<float>::infinity());
    values = blank;
  }
};

// A corner of a triangle, in steps.
struct Corner {
  int64_t x, y;
  float z;
  const float* values;
};

//        0        the weight of corner 0 at a sample is twice the area opposite, of (1, 2, sample); all three at least
//       / \       0: inside. Only triangles whose corners go round clockwise, as one sees them, are drawn: those of a
//      2---1      closed surface that face the viewer.
template <int64_t CHANNELS>  // 0: as the canvas says
void draw_triangle(const Corner& p, const Corner& q, const Corner& r, Canvas& canvas) {
  const int64_t area = (q.x - p.x) * (r.y - p.y) - (r.x - p.x) * (q.y - p.y);
  if (area <= 0) return;
  const int64_t right = std::max({p.x, q.x, r.x}), bottom = std::max({p.y, q.y, r.y});
  if (right < 0 || bottom < 0) return;
  const int64_t first_column = std::max<int64_t>(0, std::min({p.x, q.x, r.x})) / STEPS;
  const int64_t first_row = std::max<int64_t>(0, std::min({p.y, q.y, r.y})) / STEPS;
  const int64_t last_column = std::min(canvas.width - 1, right / STEPS);
  const int64_t last_row = std::min(canvas.height - 1, bottom / STEPS);
  const int64_t channels = CHANNELS > 0 ? CHANNELS : canvas.channels;
  const float share = 1.0f / static_cast<float>(area);
  // What a weight changes by from a column to the next, and from a row to the next.
  const int64_t across0 = (q.y - r.y) * STEPS, across1 = (r.y - p.y) * STEPS, across2 = -across0 - across1;
  const int64_t down0 = (r.x - q.x) * STEPS, down1 = (p.x - r.x) * STEPS;
  const int64_t u = first_column * STEPS + STEPS / 2, v = first_row * STEPS + STEPS / 2;
  int64_t first0 = (r.x - q.x) * (v - q.y) - (u - q.x) * (r.y - q.y);
  int64_t first1 = (p.x - r.x) * (v - r.y) - (u - r.x) * (p.y - r.y);
  for (int64_t row = first_row; row <= last_row; ++row, first0 += down0, first1 += down1) {
    int64_t w0 = first0, w1 = first1, w2 = area - w0 - w1, column = first_column;
    for (; column <= last_column && (w0 | w1 | w2) < 0; ++column) w0 += across0, w1 += across1, w2 += across2;
    float* nearest = canvas.depth.data() + row * canvas.width;
    float* values = canvas.values.data() + (row * canvas.width + column) * channels;
    for (; column <= last_column && (w0 | w1 | w2) >= 0; ++column, values += channels) {
      const float a = static_cast<float>(w0) * share, b = static_cast<float>(w1) * share;
      const float c = static_cast<float>(w2) * share, here = a * p.z + b * q.z + c * r.z;
      if (here < nearest[column]) {
        nearest[column] = here;
        for (int64_t i = 0; i < channels; ++i) values[i] = a * p.values[i] + b * q.values[i] + c * r.values[i];
      }
      w0 += across0, w1 += across1, w2 += across2;
    }
  }
}

void draw_frame(const Mesh& mesh, const float* places, const float* attributes, Canvas& canvas,
                std::vector<Corner>& corners) {
  canvas.clear();
  const float scale = static_cast<float>(canvas.samples * STEPS);
  for (int64_t vertex = 0; vertex < mesh.vertices; ++vertex, places += 3, attributes += canvas.channels) {
    corners[vertex] = {static_cast<int64_t>(std::floor(places[0] * scale + 0.5f)),
                       static_cast<int64_t>(std::floor(places[1] * scale + 0.5f)), places[2], attributes};
  }
  const auto draw = canvas.channels == 3 ? draw_triangle<3> : draw_triangle<0>;
  for (const int64_t* corner = mesh.corners; corner < mesh.corners + 3 * mesh.triangles; corner += 3) {
    draw(corners[corner[0]], corners[corner[1]], corners[corner[2]], canvas);
  }
}

// The means of samples x samples values: out [height, width, channels], which holds zeros before.
void reduce(const Canvas& canvas, float* out) {
  const int64_t samples = canvas.samples, channels = canvas.channels, size = canvas.width / samples * channels;
  const float share = 1.0f / static_cast<float>(samples * samples);
  const float* values = canvas.values.data();
  for (int64_t row = 0; row < canvas.height; ++row) {
    float* sums = out + row / samples * size;
    for (float* sum = sums; sum < sums + size; sum += channels) {
      for (int64_t sample = 0; sample < samples; ++sample, values += channels) {
        for (int64_t channel = 0; channel < channels; ++channel) sum[channel] += values[channel];
      }
    }
    if (row % samples == samples - 1) {
      for (int64_t i = 0; i < size; ++i) sums[i] *= share;
    }
  }
}

// Pictures [T, height, width, C] of the attributes [T, V, C] of the vertices [T, V, 3] (columns, rows, depths), over a
// background [height, width, C].
Tensor rasterize(const Tensor& vertices, const Tensor& triangles, const Tensor& attributes, const Tensor& background,
                 int64_t samples) {
  const Mesh mesh = check_mesh(vertices, triangles);
  check_dtype("attributes", attributes, ScalarType::Float);
  check_dim("attributes", attributes, 3);
  check_contiguous("attributes", attributes);
  AVPPC_CHECK(attributes.size(0) == mesh.frames && attributes.size(1) == mesh.vertices, "attributes must have shape [",
              mesh.frames, ", ", mesh.vertices, ", C], got [", attributes.size(0), ", ", attributes.size(1), ", C]");
  check_dtype("background", background, ScalarType::Float);
  check_dim("background", background, 3);
  check_contiguous("background", background);
  const int64_t height = background.size(0), width = background.size(1), channels = background.size(2);
  AVPPC_CHECK(channels == attributes.size(2), "background must have ", attributes.size(2), " channels, got ", channels);
  AVPPC_CHECK(height >= 1 && width >= 1 && height <= 4096 && width <= 4096,
              "background must have 1 to 4096 rows and columns, got ", height, " and ", width);
  AVPPC_CHECK(samples >= 1 && samples <= 8, "samples must be from 1 to 8, got ", samples);
  for (int64_t i = 0; i < 3 * mesh.frames * mesh.vertices; ++i) {
    AVPPC_CHECK(std::abs(mesh.places[i]) <= REACH, "vertices must be finite, from -65536 to 65536, got ",
                mesh.places[i]);
  }
  const int64_t shape[] = {mesh.frames, height, width, channels};
  Tensor out = torch::stable::new_zeros(attributes, {shape, 4});
  const float *values = attributes.const_data_ptr<float>(), *behind = background.const_data_ptr<float>();
  float* pictures = out.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, mesh.frames, FRAMES_A_THREAD, [&](int64_t begin, int64_t end) {
    Canvas canvas(behind, height, width, channels, samples);
    std::vector<Corner> corners(mesh.vertices);
    for (int64_t frame = begin; frame < end; ++frame) {
      draw_frame(mesh, mesh.places + frame * mesh.vertices * 3, values + frame * mesh.vertices * channels, canvas,
                 corners);
      reduce(canvas, pictures + frame * height * width * channels);
    }
  });
  return out;
}

}  // namespace
}  // namespace avppc

STABLE_TORCH_LIBRARY_FRAGMENT(avppc, library) {
  library.def("vertex_normals(Tensor vertices, Tensor triangles) -> Tensor");
  library.def(
      "rasterize(Tensor vertices, Tensor triangles, Tensor attributes, Tensor background, int samples) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(avppc, CPU, library) {
  library.impl("vertex_normals", TORCH_BOX(&avppc::vertex_normals));
  library.impl("rasterize", TORCH_BOX(&avppc::rasterize));
}
