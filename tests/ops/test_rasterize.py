"""Normals and pictures of meshes: the compiled operators against the definitions, and those against plain geometry."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from avppc.ops import _library
from avppc.ops.rasterize import rasterize, rasterize_reference, vertex_normals, vertex_normals_reference

needs_cpp = pytest.mark.skipif(
    not _library.has_cpp_ops(), reason=f"compiled operators: {_library.missing_reason('cpp')}"
)
BOTH = pytest.mark.parametrize("draw", [rasterize, rasterize_reference], ids=["compiled", "definition"])


def make_mesh(seed: int, *, frames: int = 2, vertices: int = 30, triangles: int = 60) -> tuple[Tensor, Tensor]:
    """Triangles everywhere in and around a picture of 20 x 30, some without area, on a grid that ties depths."""
    numbers = torch.Generator().manual_seed(seed)
    places = torch.rand(frames, vertices, 3, generator=numbers) * torch.tensor([50.0, 40.0, 4.0]) - 10
    places[:, ::3] = places[:, ::3].round()
    return places, torch.randint(0, vertices, (triangles, 3), generator=numbers)


def square(left: float, top: float, right: float, bottom: float, depth: float = 0.0) -> tuple[Tensor, Tensor]:
    """Two triangles that face the viewer."""
    corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
    return torch.tensor([[(x, y, depth) for x, y in corners]]), torch.tensor([[0, 1, 2], [0, 2, 3]])


@needs_cpp
@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("samples", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_pictures_are_those_of_the_definition(seed: int, samples: int, channels: int) -> None:
    vertices, triangles = make_mesh(seed)
    numbers = torch.Generator().manual_seed(seed + 100)
    attributes = torch.rand(2, 30, channels, generator=numbers)
    background = torch.rand(20, 30, channels, generator=numbers)
    found = rasterize(vertices, triangles, attributes, background, samples)
    expected = rasterize_reference(vertices, triangles, attributes, background, samples)
    assert (expected - background).abs().amax(3).gt(0.01).float().mean() > 0.3  # there is something to see
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-6)


@needs_cpp
@pytest.mark.parametrize("seed", range(4))
def test_normals_are_those_of_the_definition(seed: int) -> None:
    vertices, triangles = make_mesh(seed, frames=3)
    truth = vertex_normals_reference(vertices.double(), triangles)
    torch.testing.assert_close(vertex_normals(vertices, triangles).double(), truth, rtol=0, atol=1e-4)


@BOTH
def test_a_pixel_belongs_to_a_triangle_that_holds_its_centre(draw) -> None:
    vertices, triangles = square(1.5, 2.0, 4.5, 3.0)
    picture = draw(vertices, triangles, torch.ones(1, 4, 1), torch.zeros(5, 6, 1))[0, ..., 0]
    expected = torch.zeros(5, 6)
    expected[2, 1:5] = 1  # both edges go through centres
    assert torch.equal(picture, expected)
    finer = draw(vertices, triangles, torch.ones(1, 4, 1), torch.zeros(5, 6, 1), 2)[0, ..., 0]
    expected[2] = torch.tensor([0, 0.5, 1, 1, 0.5, 0])
    assert torch.equal(finer, expected)


@BOTH
def test_neighbours_leave_no_gap_and_values_run_evenly(draw) -> None:
    vertices, triangles = square(-0.37, -3.11, 40.73, 25.9)
    attributes = vertices[..., :2].contiguous()  # the place itself
    picture = draw(vertices, triangles, attributes, torch.full((20, 30, 2), torch.nan))[0]
    rows, columns = torch.meshgrid(torch.arange(20) + 0.5, torch.arange(30) + 0.5, indexing="ij")
    torch.testing.assert_close(picture, torch.stack([columns, rows], 2), rtol=0, atol=0.005)  # vertices are on a grid


@BOTH
def test_the_nearest_is_seen_and_what_turns_its_back_is_not(draw) -> None:
    far, triangles = square(0, 0, 4, 4, depth=2.0)
    near, _ = square(1, 1, 3, 3, depth=1.0)
    vertices = torch.cat([near, far], 1)
    attributes = torch.tensor([5.0] * 4 + [7.0] * 4).reshape(1, 8, 1)
    black = torch.zeros(4, 4, 1)
    both = torch.cat([triangles, triangles + 4])
    expected = torch.full((4, 4), 7.0)
    expected[1:3, 1:3] = 5
    for order in (both, both.flip(0)):
        assert torch.equal(draw(vertices, order, attributes, black)[0, ..., 0], expected)
    assert draw(vertices, both.flip(1), attributes, black).eq(0).all()
    assert draw(vertices, both[:0], attributes, black).eq(0).all()


@pytest.mark.parametrize("find", [vertex_normals, vertex_normals_reference], ids=["compiled", "definition"])
def test_normals_point_outwards(find) -> None:
    corners = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1], [9, 9, 9]])
    triangles = torch.tensor(
        [
            (x, 2 + y, 4 + z) if (x + y + z) % 2 == 0 else (x, 4 + z, 2 + y)
            for x in (0, 1)
            for y in (0, 1)
            for z in (0, 1)
        ]
    )
    expected = corners.clone()
    expected[6] = 0  # of no triangle
    torch.testing.assert_close(find(3 * corners[None], triangles)[0], expected)


@needs_cpp
def test_threads_do_not_change_a_bit() -> None:
    vertices, triangles = make_mesh(9, frames=7)
    attributes, background = torch.rand(7, 30, 3), torch.zeros(20, 30, 3)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append((rasterize(vertices, triangles, attributes, background), vertex_normals(vertices, triangles)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@needs_cpp
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"vertices": torch.zeros(1, 4, 2)}, "vertices must have 3 coordinates, got 2"),
        ({"vertices": torch.full((1, 4, 3), torch.nan)}, "vertices must be finite, from -65536 to 65536"),
        ({"vertices": torch.zeros(1, 4, 3, dtype=torch.float64)}, "vertices must be Float, got Double"),
        ({"triangles": torch.tensor([[0, 1, 4]])}, "triangles must be of vertices 0 to 3, got 4"),
        ({"triangles": torch.tensor([[0, 1, -1]])}, "triangles must be of vertices 0 to 3, got -1"),
        ({"attributes": torch.zeros(1, 3, 1)}, r"attributes must have shape \[1, 4, C\], got \[1, 3, C\]"),
        ({"background": torch.zeros(5, 6, 2)}, "background must have 1 channels, got 2"),
        ({"background": torch.zeros(0, 6, 1)}, "background must have 1 to 4096 rows and columns, got 0 and 6"),
        ({"samples": 9}, "samples must be from 1 to 8, got 9"),
    ],
)
def test_what_cannot_be_drawn_is_named(changed, message: str) -> None:
    vertices, triangles = square(0, 0, 4, 4)
    arguments = {
        "vertices": vertices,
        "triangles": triangles,
        "attributes": torch.ones(1, 4, 1),
        "background": torch.zeros(5, 6, 1),
        "samples": 1,
    }
    with pytest.raises(RuntimeError, match=message):
        rasterize(**(arguments | changed))


@needs_cpp
def test_the_operators_are_registered_as_torch_wants() -> None:
    vertices, triangles = make_mesh(0)
    torch.library.opcheck(torch.ops.avppc.vertex_normals.default, (vertices, triangles))
    arguments = vertices, triangles, torch.rand(2, 30, 3), torch.zeros(8, 9, 3), 2
    torch.library.opcheck(torch.ops.avppc.rasterize.default, arguments)
