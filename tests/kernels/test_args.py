"""What a launch is given."""

from array import array

import pytest

from lmc.kernels import PagesArgs, Tables, before, pages_args, starts

TABLES = Tables(1, 2, 3, 4, 5)
PLANES = array("q", [64, 9, 100, 96, 64, 9, 8192, 5000, 64, 9, 7, 7])
PIECES = array("q", [64, 8, 1, 3, 64, 8, 0, 0, 64, 4, 0, 4])


def args_of(chosen: range, wave: int = 32, grid: int = 4) -> PagesArgs:
    args = pages_args(PLANES, chosen, PIECES, TABLES, wave=wave, grid=grid)
    assert args is not None
    return args


def test_columns_are_sums_of_what_is_before() -> None:
    assert before(PLANES).tolist() == [0, 96, 5096]
    assert starts(PIECES).tolist() == [0, 3, 3]
    assert before(array("q")).tolist() == []


def test_counts_cover_the_largest_of_the_chosen() -> None:
    args = args_of(range(3))
    assert (args.first_plane, args.end_plane, args.num_pieces, args.max_pages) == (0, 3, 3, 4)
    assert (args.slices, args.slice_bytes, args.grid) == (2, 4096, 4)
    assert (args.planes, args.before, args.pieces, args.starts, args.page_ids) == TABLES
    assert args_of(range(1)).slices == 1


@pytest.mark.parametrize(
    ("page_bytes", "wave", "crew"),
    [
        (1, 32, 1),
        (16, 32, 1),
        (17, 32, 2),
        (128, 32, 8),
        (512, 32, 8),
        (1024, 64, 16),
        (1152, 32, 32),
        (4096, 32, 32),
        (4096, 64, 64),
        (1 << 20, 64, 64),
    ],
)
def test_a_crew_has_a_page_in_flight(page_bytes: int, wave: int, crew: int) -> None:
    planes = array("q", [64, 1, page_bytes, page_bytes])
    args = pages_args(planes, range(1), PIECES, TABLES, wave=wave, grid=1)
    assert args
    assert 1 << args.crew_bits == crew


@pytest.mark.parametrize("page_tokens", [1, 16, 64, 256])
@pytest.mark.parametrize("row_bytes", [256, 576, 2048])
def test_one_layer_of_one_chunk_keeps_many_crews_busy(page_tokens: int, row_bytes: int) -> None:
    page_bytes, pages = page_tokens * row_bytes, 256 // page_tokens
    planes = array("q", [64, 999, page_bytes, page_bytes] * 2)
    pieces = array("q", [64, pages, 0, pages])
    args = pages_args(planes, range(2), pieces, TABLES, wave=32, grid=1)
    assert args
    crews = 2 * args.num_pieces * args.max_pages * args.slices
    assert crews << args.crew_bits >= 1024  # threads


@pytest.mark.parametrize(
    ("chosen", "pieces"), [(range(2, 2), PIECES), (range(3), array("q")), (range(3), PIECES[4:8])]
)
def test_nothing_to_move_is_no_launch(chosen: range, pieces: "array[int]") -> None:
    assert pages_args(PLANES, chosen, pieces, TABLES, wave=32, grid=4) is None


@pytest.mark.parametrize(
    ("page_bytes", "pages", "grid", "name"),
    [(1 << 44, 1, 1, "slices"), (16, 1 << 31, 1, "max_pages"), (16, 1, 1 << 23, "grid x crews")],
)
def test_what_32_bits_cannot_count_is_refused(
    page_bytes: int, pages: int, grid: int, name: str
) -> None:
    planes, pieces = array("q", [64, 1, page_bytes, page_bytes]), array("q", [64, pages, 0, pages])
    with pytest.raises(ValueError, match=name):
        pages_args(planes, range(1), pieces, TABLES, wave=32, grid=grid)
