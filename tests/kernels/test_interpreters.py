"""The interpreters refuse what they do not know, and what a GPU would not do."""

from collections import Counter

import numpy as np
import pytest

from . import cdna, ptx
from .memory import Fault, Memory

PTX = """
.visible .entry kernel(
	.param .align 8 .b8 kernel_param_0[8]
)
{{
	.reg .pred 	%p<2>;
	.reg .b32 	%r<4>;
	.reg .b64 	%rd<4>;
	ld.param.u64 	%rd1, [kernel_param_0];
	{body}
	ret;
}}
"""
CDNA = """
kernel:                                 ; @kernel
	s_load_dwordx2 s[4:5], s[0:1], 0x0
	s_waitcnt lgkmcnt(0)
	{body}
	s_endpgm
	.section	.rodata
	.amdhsa_kernel kernel
		.amdhsa_user_sgpr_count 2
		.amdhsa_user_sgpr_kernarg_segment_ptr 1
		.amdhsa_system_sgpr_workgroup_id_x 1
	.end_amdhsa_kernel
"""


def run(interpreter, text: str, body: str, threads: int = 64) -> np.ndarray:
    """64 words of memory after a kernel that was given their address."""
    memory, words = Memory(), np.arange(64, dtype=np.uint32)
    args = memory.add(words).to_bytes(8, "little")
    kernel = interpreter.parse(text.format(body="\n\t".join(body.split("; "))))["kernel"]
    interpreter.launch(kernel, memory, args, 1, threads, Counter())
    return words


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("fancy.u32 \t%r1, %r2;", "unknown PTX instruction fancy.u32"),
        ("add.f16 \t%r1, 1, 2;", "f16"),
        ("ld.global.weird.u32 \t%r1, [%rd1];", "unknown PTX instruction ld.global.weird.u32"),
        ("ld.shared.u32 \t%r1, [%rd1];", "unknown PTX instruction ld.shared.u32"),
        ("what is this", "unknown PTX statement"),
        ("add.s32 \t%r1, %r2, 1;", "%r2 is read before it is written"),
        ("ld.global.u32 \t%r1, [%rd1+256];", "outside of every buffer"),
        ("ld.global.u32 \t%r1, [%rd1+-4];", "outside of every buffer"),
        ("ld.global.v4.u32 \t{%r0, %r1, %r2, %r3}, [%rd1+8];", "misaligned access of 16 bytes"),
        ("mov.u32 \t%r1, 0;; div.u32 \t%r1, %r1, %r1;", "division by zero"),
        ("$L__BB0_1:; bra.uni \t$L__BB0_1;", "does not end"),
    ],
)
def test_ptx_that_is_refused(body: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ptx, "MAX_STEPS", 100)
    with pytest.raises((Fault, KeyError), match=message):
        run(ptx, PTX, body)


def test_ptx_threads_part_and_meet_again() -> None:
    body = (
        "mov.u32 \t%r1, %tid.x;; mul.wide.u32 \t%rd2, %r1, 4;; add.s64 \t%rd2, %rd1, %rd2;; "
        "setp.lt.u32 \t%p1, %r1, 3;; @%p1 bra \t$L__BB0_1;; mov.u32 \t%r1, 7;; $L__BB0_1:; "
        "shl.b32 \t%r2, %r1, 32;; add.s32 \t%r1, %r1, %r2;; st.global.u32 \t[%rd2], %r1;"
    )
    assert run(ptx, PTX, body).tolist() == [0, 1, 2, *[7] * 61]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("v_fancy_b32 v1, v2", "unknown CDNA instruction v_fancy_b32"),
        ("s_fancy_b32 s4, s5, s5", "unknown CDNA instruction s_fancy_b32"),
        ("flat_load_dword v1, v[2:3]", "unknown CDNA instruction flat_load_dword"),
        ("ds_write_b32 v1, v2", "unknown CDNA instruction ds_write_b32"),
        ("global_atomic_add v1, v[2:3], off", "unknown CDNA instruction global_atomic"),
        ("s_mov_b32 s6, s9", "s9 is read before it is written"),
        ("v_mov_b32_e32 v1, m0", "unknown operand m0"),
        ("v_mov_b32_e32 v1, 0x100; global_load_dword v2, v1, s[4:5]", "outside of every buffer"),
        ("v_mov_b32_e32 v1, 0; global_load_dword v2, v1, s[4:5] offset:-4", "outside of every"),
        ("v_mov_b32_e32 v1, 8; global_load_dwordx4 v[4:7], v1, s[4:5]", "misaligned access of 16"),
        (
            "v_mov_b32_e32 v1, 0; global_load_dword v2, v1, s[4:5]; v_mov_b32_e32 v3, v2",
            "v2 is touched before its load was waited for",
        ),
        (
            "s_load_dword s6, s[0:1], 0x0; s_waitcnt vmcnt(0); s_mov_b32 s7, s6",
            "s6 is touched before its load was waited for",
        ),
        (".LBB0_1:; s_branch .LBB0_1", "does not end"),
    ],
)
def test_cdna_that_is_refused(body: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cdna, "MAX_STEPS", 100)
    with pytest.raises(Fault, match=message):
        run(cdna, CDNA, body)


def test_cdna_lanes_that_are_off_stay_as_they_are() -> None:
    body = (
        "v_lshlrev_b32_e32 v1, 2, v0; v_mov_b32_e32 v2, 7; v_cmp_gt_u32_e32 vcc, 3, v0; "
        "s_and_saveexec_b64 s[6:7], vcc; v_mov_b32_e32 v2, 5; global_store_dword v1, v2, s[4:5]; "
        "s_or_b64 exec, exec, s[6:7]; v_cmp_lt_u32_e32 vcc, 60, v0; "
        "s_and_saveexec_b64 s[6:7], vcc; global_store_dword v1, v2, s[4:5]"
    )
    assert run(cdna, CDNA, body).tolist() == [5, 5, 5, *range(3, 61), 7, 7, 7]


RDNA = CDNA.replace(
    "\t.amdhsa_kernel kernel\n", "\t.amdhsa_kernel kernel\n\t\t.amdhsa_wavefront_size32 1\n"
)


def rdna(arch: str) -> str:
    count = "user_sgpr_count 15" if arch == "gfx1100" else "user_sgpr_count 2"
    target = f'\t.amdgcn_target "amdgcn-amd-amdhsa--{arch}"\n'
    return target + RDNA.replace("user_sgpr_count 2", count).replace("dwordx2", "b64")


@pytest.mark.parametrize("arch", ["gfx1100", "gfx1201"])
def test_rdna_runs_32_lanes_and_two_moves_at_once(arch: str) -> None:
    body = (
        "v_lshlrev_b32_e32 v1, 2, v0; v_dual_mov_b32 v2, 7 :: v_dual_mov_b32 v3, 5; "
        "v_dual_mov_b32 v2, v3 :: v_dual_mov_b32 v3, v2; s_mov_b32 s6, exec_lo; "
        "v_cmpx_gt_u32_e64 3, v0; global_store_b32 v1, v2, s[4:5]; s_mov_b32 exec_lo, s6; "
        "v_cmp_lt_u32_e32 vcc_lo, 60, v0; s_and_saveexec_b32 s6, vcc_lo; "
        "v_add_co_u32 v4, vcc_lo, -1, v3; v_add_co_ci_u32_e64 v5, null, 0, 0, vcc_lo; "
        "v_dual_cndmask_b32 v6, v2, v3 :: v_dual_cndmask_b32 v7, v3, v2; "
        "v_add_nc_u32_e32 v6, v6, v5; global_store_b32 v1, v6, s[4:5]"
    )
    assert run(cdna, rdna(arch), body).tolist() == [5, 5, 5, *range(3, 61), 8, 8, 8]


@pytest.mark.parametrize(
    ("wait", "early"),
    [("s_waitcnt vmcnt(0)", False), ("s_waitcnt vmcnt(1)", True), ("s_wait_loadcnt 0x0", False)],
)
def test_rdna_counts_loads_alone(wait: str, early: bool) -> None:
    body = (
        "v_mov_b32_e32 v1, 0; global_load_b32 v2, v1, s[4:5]; global_store_b32 v1, v0, s[4:5]; "
        f"{wait}; v_mov_b32_e32 v3, v2"
    )
    if early:
        with pytest.raises(Fault, match="v2 is touched"):
            run(cdna, rdna("gfx1201"), body, threads=32)
    else:
        run(cdna, rdna("gfx1201"), body, threads=32)


def test_a_wait_lets_the_latest_loads_fly_on() -> None:
    body = (
        "v_mov_b32_e32 v1, 0; global_load_dword v2, v1, s[4:5]; "
        "global_load_dword v3, v1, s[4:5]; s_waitcnt vmcnt(1); v_mov_b32_e32 v4, v2"
    )
    run(cdna, CDNA, body)
    with pytest.raises(Fault, match="v3 is touched"):
        run(cdna, CDNA, body + "; v_mov_b32_e32 v4, v3")


def test_a_kernel_that_starts_in_another_way_is_refused() -> None:
    with pytest.raises(Fault, match="user_sgpr_count"):
        cdna.parse(CDNA.format(body="").replace("user_sgpr_count 2", "user_sgpr_count 4"))
