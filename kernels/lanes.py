"""Several scans in one launch: the directions of a layer, or layers of a stack. Each has programs of its own, a *lane*.

All lanes have the same sizes, and each has its block of every buffer. Between two layers there may be dropout. Whether
an element is kept is a function of a seed and of its place, so that backward finds the same answer.
"""

import triton
import triton.language as tl


@triton.jit
def place(SLICES: tl.constexpr, LANES: tl.constexpr):
    """Where this program stands in the grid: (slice, group, groups of a lane, lane)."""
    slice_index = tl.program_id(0) % SLICES
    groups = tl.num_programs(0) // (SLICES * LANES)
    if LANES == 1:
        group, lane = tl.program_id(0) // SLICES, tl.cast(0, tl.int32)  # the compiler knows the lane: no offsets
    else:
        group, lane = tl.program_id(0) // SLICES % groups, tl.program_id(0) // (SLICES * groups)
    return slice_index, group, groups, lane


@triton.jit
def of_lane(pointers, lane, LANES: tl.constexpr):
    """The one of LANES pointers that belongs to a lane."""
    chosen = pointers[0]
    for other in tl.static_range(1, LANES):
        chosen = tl.where(lane == other, pointers[other], chosen)
    return chosen


@triton.jit
def dropout_scale(seed_ptr, lane, elements, probability):
    """What dropout multiplies elements with: 0 or 1 / (1 - probability).

    The random numbers are Philox's (Salmon et al., 2011). Its counter is the element's 64-bit number in the lane, and
    the lane.
    """
    low, high = elements.to(tl.uint32), (elements >> 32).to(tl.uint32)
    bits, _, _, _ = tl.philox(tl.load(seed_ptr), low, high, tl.zeros_like(low) + lane.to(tl.uint32), tl.zeros_like(low))
    kept = tl.uint_to_uniform_float(bits) >= probability
    return tl.where(kept, 1.0 / (1.0 - tl.minimum(probability, 0.9999999)), 0.0)


@triton.jit(do_not_specialize=["lane", "elements", "first_element"])
def dropout_scales(
    seed_ptr,  # (1,) int64
    lane,
    probability,
    scale_ptr,  # (elements,)
    elements,
    first_element,  # its number in the lane
    BLOCK: tl.constexpr,
):
    """`dropout_scale` of all elements of a lane, for what is computed outside the scans."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    scale = dropout_scale(seed_ptr, tl.cast(lane, tl.int32), first_element + places, probability)
    tl.store(scale_ptr + places, scale.to(scale_ptr.dtype.element_ty), mask=places < elements)
