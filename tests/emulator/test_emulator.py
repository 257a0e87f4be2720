"""The emulator of PTX, on programs by hand."""

import pytest
import torch
from torch import Tensor

from tests.emulator import Deadlock, Diverged, Fault, Race, launch

HEADER = """
.version 8.0
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry program(
	.param .u64 .ptr .global .align 1 program_param_0
)
.reqntid 64
{
	.reg .pred 	%p<9>;
	.reg .b32 	%r<99>;
	.reg .b64 	%rd<9>;
	ld.param.b64 	%rd1, [program_param_0];
	mov.u32 	%r1, %tid.x;
	mov.u32 	%r2, %ctaid.x;
	mul.wide.u32 	%rd2, %r1, 16;
	add.s64 	%rd3, %rd1, %rd2;
"""


def emulate(body: str, memory: Tensor, programs: int = 1, seed: int = 0) -> None:
    """Run a program of two warps, which finds in %rd1 the memory, and in %rd3 16 bytes of it for every thread."""
    launch(f"{HEADER}{body}\n\tret;\n}}\n", (programs, 1, 1), (memory,), 4096, seed)


# Waits until none of the 16 bytes is a sentinel any more: scopes, with registers and labels of their own.
SPIN = """{
	.reg .pred missing;
	.reg .b32 largest;
WAIT:
	ld.relaxed.gpu.global.v4.b32 {%r10, %r11, %r12, %r13}, [%rd3];
	max.u16x2 largest, %r10, %r11;
	max.u16x2 largest, largest, %r12;
	max.u16x2 largest, largest, %r13;
	shr.u32 %r14, largest, 16;
	setp.eq.b32 missing, %r14, 0xffff;
	@missing bra WAIT;
	and.b32 %r14, largest, 65535;
	setp.eq.b32 missing, %r14, 0xffff;
	@missing bra WAIT;
}"""


@pytest.mark.parametrize("seed", range(5))
def test_programs_wait_for_each_other(seed: int) -> None:
    """Program 0 writes, word by word and late; program 1 waits and writes the sum elsewhere."""
    memory = torch.arange(64 * 4, dtype=torch.int32).view(64, 4)
    buffer = torch.cat([torch.full_like(memory, -1), torch.zeros_like(memory)])
    body = f"""
	setp.ne.b32 %p1, %r2, 0;
	@%p1 bra READ;
	shl.b32 %r3, %r1, 2;
	add.s32 %r4, %r3, 1;
	add.s32 %r5, %r3, 2;
	add.s32 %r6, %r3, 3;
	st.global.cg.v4.b32 [%rd3 + 0], {{ %r3, %r4, %r5, %r6 }};
	bra.uni END;
READ:
	{SPIN}
	{SPIN}
	add.s32 %r10, %r10, %r11;
	add.s32 %r12, %r12, %r13;
	add.s32 %r10, %r10, %r12;
	st.global.b32 [%rd3+1024], %r10;
END:
	"""
    emulate(body, buffer, programs=2, seed=seed)
    assert torch.equal(buffer[:64], memory)
    assert torch.equal(buffer[64:, 0], memory.sum(1))


WRITE_SHARED = """
	shl.b32 %r3, %r1, 2;
	mov.b32 %r4, global_smem;
	add.s32 %r4, %r4, %r3;
	st.shared.b32 [%r4], %r1;
"""
READ_SHARED = """
	xor.b32 %r5, %r3, 128;
	ld.shared.b32 %r6, [%r5+1024];
	st.global.b32 [%rd3], %r6;
"""


def test_the_barrier_between_two_warps() -> None:
    for seed in range(5):
        memory = torch.zeros(64, 4, dtype=torch.int32)
        emulate(WRITE_SHARED + "\tbar.sync 0;" + READ_SHARED, memory, seed=seed)
        assert memory[:, 0].tolist() == [thread ^ 32 for thread in range(64)]
        with pytest.raises(Race, match=r"shared memory \(.*\.shared\.b32, line"):
            emulate(WRITE_SHARED + READ_SHARED, memory, seed=seed)


@pytest.mark.parametrize(
    ("body", "mistake"),
    [
        ("ld.global.b32 %r3, [%rd3+1024];", Fault),  # past the end
        ("ld.global.b32 %r3, [%rd1+-4];", Fault),
        ("ld.global.v2.b32 {%r3, %r4}, [%rd1+4];", Fault),  # not aligned
        ("mov.b64 %rd4, 64; ld.global.b32 %r3, [%rd4];", Fault),  # no address at all
        ("mov.b32 %r4, 9999; ld.shared.b32 %r3, [%r4];", Fault),
        ("st.global.b32 [%rd1], %r1;", Race),  # both warps, different values
        ("setp.lt.u32 %p1, %r1, 40; @%p1 bra NEXT; bar.sync 0; NEXT:", Diverged),
        ("setp.lt.u32 %p1, %r1, 32; @%p1 bra NEXT; bar.sync 0; NEXT:", Deadlock),  # one warp waits for the other
        ("AGAIN: ld.volatile.global.b32 %r3, [%rd1]; setp.eq.b32 %p1, %r3, 0; @%p1 bra AGAIN;", Deadlock),
    ],
)
def test_mistakes(body: str, mistake: type[RuntimeError]) -> None:
    with pytest.raises(mistake):
        emulate(body, torch.zeros(64, 4, dtype=torch.int32))


def test_a_cache_may_be_stale() -> None:
    """Waiting by ordinary loads: the first-level cache may never show what another program has written."""
    body = """
	setp.eq.b32 %p1, %r2, 0;
	@%p1 st.global.b32 [%rd3], 1;
	@%p1 bra END;
AGAIN:
	ld.global.b32 %r3, [%rd3];
	setp.eq.b32 %p2, %r3, 0;
	@%p2 bra AGAIN;
END:
	"""
    with pytest.raises(Race):
        emulate(body, torch.zeros(64, 4, dtype=torch.int32), programs=2)
    emulate(body.replace("ld.global", "ld.volatile.global"), torch.zeros(64, 4, dtype=torch.int32), programs=2)


def test_unknown_instructions_are_named() -> None:
    with pytest.raises(NotImplementedError, match=r"atom\.global\.add\.u32, line"):
        emulate("atom.global.add.u32 %r3, [%rd1], 1;", torch.zeros(4))
