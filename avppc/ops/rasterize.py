"""Pictures of triangle meshes: normals of the vertices, and a rasteriser with a depth buffer.

Both have their definition in plain torch beside them, triangle by triangle; on the CPU compiled operators take its
place. They draw the synthetic heads.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from avppc.ops import _library
from avppc.ops.modes import is_differentiated

_STEPS = 256  # of a point's part of a pixel: the vertices are moved to this grid, so that coverage is exact


def vertex_normals(vertices: Tensor, triangles: Tensor) -> Tensor:
    """The mean direction of the triangles around each vertex, weighted by their areas: [T, V, 3] float32.

    Args:
        vertices: [T, V, 3] float32.
        triangles: [F, 3] int64, numbers of vertices; (b - a) x (c - a) of a triangle (a, b, c) points outwards.

    Returns:
        Vectors of length 1, or 0 where the triangles cancel out or there are none.
    """
    if _can_compile(vertices):
        normals: Tensor = torch.ops.avppc.vertex_normals(vertices.contiguous(), triangles.contiguous())
        return normals
    return vertex_normals_reference(vertices, triangles)


def vertex_normals_reference(vertices: Tensor, triangles: Tensor) -> Tensor:
    """The definition of vertex_normals."""
    a, b, c = vertices[:, triangles].unbind(2)  # each [T, F, 3]
    directions = torch.linalg.cross(b - a, c - a)
    sums = torch.zeros_like(vertices)
    for corner in range(3):
        sums = sums.index_add(1, triangles[:, corner], directions)
    lengths = sums.norm(dim=2, keepdim=True)
    return torch.where(lengths > 0, sums / lengths, 0.0)


def rasterize(vertices: Tensor, triangles: Tensor, attributes: Tensor, background: Tensor, samples: int = 1) -> Tensor:
    """Pictures of the nearest triangles over a background: [T, H, W, C] float32.

    A pixel is the mean of samples x samples points, the middles of its equal parts. A point shows a triangle if it is
    inside or on its edge; of two at the same depth the first. Triangles whose corners go round anticlockwise, as one
    sees them (rows go down), turn their back and are not drawn.

    Args:
        vertices: [T, V, 3] float32: column and row in pixels (the first pixel's centre is at 0.5, 0.5) and depth, which
            grows away from the viewer; from -65536 to 65536.
        triangles: [F, 3] int64, numbers of vertices.
        attributes: [T, V, C] float32, what is interpolated between the vertices.
        background: [H, W, C] float32, H and W from 1 to 4096.
        samples: points a pixel in each direction, 1 to 8.
    """
    if _can_compile(vertices):
        tensors = (tensor.contiguous() for tensor in (vertices, triangles, attributes, background))
        pictures: Tensor = torch.ops.avppc.rasterize(*tensors, samples)
        return pictures
    return rasterize_reference(vertices, triangles, attributes, background, samples)


def rasterize_reference(
    vertices: Tensor, triangles: Tensor, attributes: Tensor, background: Tensor, samples: int = 1
) -> Tensor:
    """The definition of rasterize: each triangle on all points."""
    x, y = (vertices[..., :2] * (samples * _STEPS) + 0.5).floor().to(torch.int64).unbind(-1)  # [T, V]
    points = background.repeat_interleave(samples, 0).repeat_interleave(samples, 1)
    v, u = (torch.arange(size, device=x.device) * _STEPS + _STEPS // 2 for size in points.shape[:2])
    pictures = points.expand(len(vertices), *points.shape)  # [T, rows, columns, C]
    depth = torch.full(pictures.shape[:3], torch.inf, device=x.device)
    for corners in triangles:
        (x0, x1, x2), (y0, y1, y2) = (places[:, corners, None, None].unbind(1) for places in (x, y))  # [T, 1, 1]
        area = (x1 - x0) * (y2 - y0) - (x2 - x0) * (y1 - y0)
        w0 = (x2 - x1) * (v[:, None] - y1) - (u - x1) * (y2 - y1)  # [T, rows, columns]
        w1 = (x0 - x2) * (v[:, None] - y2) - (u - x2) * (y0 - y2)
        weights = torch.stack([w0, w1, area - w0 - w1], 3)
        inside = (area > 0) & (weights >= 0).all(3)
        shares = weights.to(torch.float32) * (1 / area.to(torch.float32))[..., None]
        here = (shares * vertices[:, None, None, corners, 2]).sum(3)
        nearest = inside & (here < depth)
        depth = torch.where(nearest, here, depth)
        pictures = torch.where(nearest[..., None], shares @ attributes[:, None, corners], pictures)
    return functional.avg_pool2d(pictures.movedim(3, 1), samples).movedim(1, 3).contiguous()


def _can_compile(vertices: Tensor) -> bool:
    """Whether the compiled operators take these vertices."""
    return vertices.device.type == "cpu" and _library.has_cpp_ops() and not is_differentiated(vertices)


def _vertex_normals_fake(vertices: Tensor, triangles: Tensor) -> Tensor:
    return torch.empty_like(vertices)


def _rasterize_fake(
    vertices: Tensor, triangles: Tensor, attributes: Tensor, background: Tensor, samples: int
) -> Tensor:
    return attributes.new_empty((vertices.shape[0], *background.shape))


if _library.has_cpp_ops():
    torch.library.register_fake("avppc::vertex_normals", _vertex_normals_fake)
    torch.library.register_fake("avppc::rasterize", _rasterize_fake)
