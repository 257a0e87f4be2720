"""How long a value takes from one multiprocessor to another: two programs hand a number back and forth.

It is the floor under every step of a scan whose programs exchange, and it depends on where the two are: a GPU's L2 has
parts, and a multiprocessor is nearer to one of them. So one program is paired with every other in turn.
"""

from __future__ import annotations

import statistics

import torch
import triton
import triton.language as tl

from lstm_triton.kernels.exchange import MOST_LOOKS, give_up

from .devices import Cpu
from .results import JsonObject

ROUNDS = 500  # there and back, for each pair


@triton.jit
def wait_for(pointer, turn):
    looks = 0
    while tl.load(pointer, volatile=True) < turn:
        looks += 1
        if looks > MOST_LOOKS:
            give_up()


@triton.jit(do_not_specialize=["partner", "rounds"])
def ping_pong(numbers_ptr, partner, rounds):
    """numbers_ptr: (2,) int32, zeros on entry. Program 0 and its partner publish there the number they have reached."""
    program = tl.program_id(0)
    if program == 0:
        for turn in range(1, rounds + 1):
            tl.store(numbers_ptr, turn, cache_modifier=".cg")
            wait_for(numbers_ptr + 1, turn)
    if program == partner:
        for turn in range(1, rounds + 1):
            wait_for(numbers_ptr, turn)
            tl.store(numbers_ptr + 1, turn, cache_modifier=".cg")


def times(device: Cpu) -> JsonObject:
    """Nanoseconds of a hand-off one way between program 0 and the others, one program for each multiprocessor.

    A GPU deals programs out to idle multiprocessors first, so that each of these has one of its own.
    """
    from lstm_triton.scan import launch
    from lstm_triton.target import Device

    on_gpu = device.torch_device.type == "cuda"
    programs = Device.of(device.torch_device).multiprocessors if on_gpu else 3
    rounds = ROUNDS if on_gpu else 2
    options = {"num_warps": 1, "launch_cooperative_grid": True}

    def call(partner: int) -> None:
        numbers = torch.zeros(2, dtype=torch.int32, device=device.torch_device)
        arguments = {"numbers_ptr": numbers, "partner": partner, "rounds": rounds}
        prepared = launch.prepared(ping_pong, (programs,), {}, options)
        launch.run(prepared, device.torch_device, arguments)

    with device.active():
        call(1)
        found = sorted(
            statistics.median(device.time(lambda partner=partner: call(partner), 100.0) for _ in range(3))  # type: ignore[misc]
            * 1e3
            / (2 * rounds)
            for partner in range(1, programs)
        )
    return {
        "nearest_ns": round(found[0]),
        "median_ns": round(statistics.median(found)),
        "farthest_ns": round(found[-1]),
        "pairs": len(found),
    }
