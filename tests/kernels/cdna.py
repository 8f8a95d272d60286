"""Executes AMD's assembly without a GPU, numpy over the lanes of a wave: CDNA (gfx90a, gfx942,
gfx950, 64 lanes) and RDNA (gfx1100, gfx1201, 32 lanes).

Knows what clang and Triton write for our kernels; anything else is a Fault that names it. RDNA's
names for what CDNA has too are CDNA's here. A register whose load was not waited for must not be
touched. Not modelled: time, caches, the order of memory.
"""

import functools
import operator
import re
import struct
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .memory import Fault, Memory

U32, U64, I32, F32 = np.uint32, np.uint64, np.int32, np.float32
MASK32, MASK64 = 2**32 - 1, 2**64 - 1
MAX_STEPS = 500_000
NO_EFFECT = {"s_nop", "s_barrier"}  # waves here share nothing
DIRECTIVES = (".loc", ".cfi_", ".file", ".p2align")
NO_EFFECT |= {"s_clause", "s_delay_alu", "s_waitcnt_depctr", "s_wait_alu"}
CACHE_HINTS = {"nt", "sc0", "sc1", "glc", "slc", "dlc"}
COUNTERS = {"s_wait_loadcnt": "vmcnt", "s_wait_kmcnt": "lgkmcnt"}
WORDS = {"b32": "dword", "b64": "dwordx2", "b96": "dwordx3", "b128": "dwordx4", "b256": "dwordx8"}
WORDS |= {"u8": "ubyte", "b8": "byte", "d16_hi_b8": "byte_d16_hi", "d16_u8": "ubyte_d16"}
RENAMED = [
    (r"(s_load|global_load|global_store)_(\w+)", lambda m: f"{m[1]}_{WORDS.get(m[2], m[2])}"),
    (r"s_and_not1_(\w+)", r"s_andn2_\1"),
    (r"s_(add|sub)_co_(\w+)", r"s_\1_\2"),
    (r"v_(add|sub|subrev)_nc_u32", r"v_\1_u32"),
    (r"v_add_co_ci_u32", "v_addc_co_u32"),
    (r"v_sub_co_ci_u32", "v_subb_co_u32"),
    (r"v_mad_co_u64_u32", "v_mad_u64_u32"),
]
"""RDNA's names, and CDNA's."""
TYPES = {"u": U32, "i": I32, "f": F32, "U": U64}


class Instruction(NamedTuple):
    name: str  # without _e32 and _e64
    operands: list[str]
    modifiers: dict[str, int]
    text: str


class Kernel(NamedTuple):
    name: str
    code: list[Instruction]
    labels: dict[str, int]
    first_scalar: int  # of the address of the arguments
    block: str  # where the number of the block is
    lanes: int


def parse(text: str) -> dict[str, Kernel]:
    bodies = re.findall(r"^(\w+): +; @\1\n(.*?)^\t\.section", text, re.DOTALL | re.MULTILINE)
    return {name: _kernel(name, body, text) for name, body in bodies}


def _kernel(name: str, body: str, text: str) -> Kernel:
    described = text.partition(f".amdhsa_kernel {name}\n")[2].partition(".end_amdhsa_kernel")[0]
    facts = dict(re.findall(r"\.amdhsa_(\w+) (\d+)", described))
    generation = re.search(r'\.amdgcn_target ".*-gfx(\d+)\w\w"', text)
    rdna = int(generation[1]) if generation and int(generation[1]) >= 10 else 0
    unused = 4 * int(facts.get("user_sgpr_private_segment_buffer", 0))  # gfx90a puts it first
    # what is preloaded is not relied on: a kernel begins with what loads it where nothing was
    preloaded = int(facts.get("user_sgpr_kernarg_preload_length", 0))
    count = 15 if rdna == 11 else unused + 2 + preloaded
    expected = {"user_sgpr_count": count, "user_sgpr_kernarg_segment_ptr": 1}
    expected |= {"system_sgpr_workgroup_id_x": 1, "wavefront_size32": int(rdna > 0)}
    expected |= {"private_segment_fixed_size": 0, "group_segment_fixed_size": 0}
    if wrong := {key for key, value in expected.items() if int(facts.get(key, 0)) != value}:
        raise Fault(f"{name} starts in another way: {sorted(wrong)}")
    block = "ttmp9" if rdna == 12 else f"s{count}"
    kernel = Kernel(name, [], {}, unused, block, 32 if rdna else 64)
    for line in body.splitlines():
        statement = line.partition(";")[0].strip()
        if statement.endswith(":"):
            kernel.labels[statement[:-1]] = len(kernel.code)
        elif statement and not statement.startswith(DIRECTIVES):
            kernel.code.append(_instruction(statement))
    return kernel


def _instruction(statement: str) -> Instruction:
    if "::" in statement:  # two at once
        return Instruction("dual", _operands_of_both(statement), {}, statement)
    name, *words = re.findall(r"[\w\-.()]+(?:\[\d+:\d+\]|:\[[\d,]+\]|:-?\w+)?", statement)
    words = [word for word in words if not word.startswith("th:")]
    pairs = [re.fullmatch(r"(\w+):(-?\w+)", word) for word in words]
    modifiers = {pair[1]: int(pair[2], 0) for pair in pairs if pair}
    operands = [
        w for w, pair in zip(words, pairs, strict=True) if not pair and w not in CACHE_HINTS
    ]
    name = re.sub(r"_e(32|64)$", "", name)
    for known, cdna in RENAMED:
        name = re.sub(f"^{known}$", cdna, name)
    if name in COUNTERS:
        name, operands = "s_waitcnt", [f"{COUNTERS[name]}({int(operands[0], 0)})"]
    if name.startswith("v_cmpx_"):
        name, operands = name.replace("cmpx", "cmp"), ["exec_lo", *operands]
    return Instruction(name, operands, modifiers, statement)


def _halves(statement: str) -> list[Instruction]:
    """Of two at once, each by its own name."""
    found = []
    for half in statement.split("::"):
        one = _instruction(half.strip().replace("v_dual_", "v_"))
        implied = ["vcc_lo"] if one.name == "v_cndmask_b32" else []
        found.append(one._replace(operands=[*one.operands, *implied]))
    return found


def _operands_of_both(statement: str) -> list[str]:
    return [operand for half in _halves(statement) for operand in half.operands]


def launch(
    kernel: Kernel, memory: Memory, args: bytes, grid: int, block: int, executed: Counter[str]
) -> None:
    given = memory.add(np.frombuffer(args, np.uint8).copy())
    for index in range(grid):
        for first in range(0, block, kernel.lanes):
            Wave(kernel, memory, given, index, first, executed).run()


class Operand(NamedTuple):
    kind: str  # "v", "s", "special" or "literal"
    index: int
    count: int
    name: str


@functools.cache
def operand_of(text: str) -> Operand:
    if found := re.fullmatch(r"([vs])(?:(\d+)|\[(\d+):(\d+)\])", text):
        first = int(found[2] or found[3])
        return Operand(found[1], first, int(found[4] or first) - first + 1, text)
    if text in ("vcc", "exec"):
        return Operand("special", 0, 2, text)
    if text in ("vcc_lo", "exec_lo", "ttmp9"):
        return Operand("special", 0, 1, text.removesuffix("_lo"))
    if text == "null":
        return Operand("null", 0, 0, text)
    if re.fullmatch(r"-?(0x[0-9a-f]+|\d+)", text):
        return Operand("literal", int(text, 0), 0, text)
    if re.fullmatch(r"-?\d+\.\d+", text):
        return Operand("literal", struct.unpack("<I", struct.pack("<f", float(text)))[0], 0, text)
    raise Fault(f"unknown operand {text}")


@functools.lru_cache
def lanes_of(mask: int, lanes: int) -> np.ndarray:
    bits = np.frombuffer(mask.to_bytes(lanes // 8, "little"), np.uint8)
    return np.unpackbits(bits, bitorder="little").astype(bool)


def mask_of(lanes: np.ndarray) -> int:
    return int.from_bytes(np.packbits(lanes, bitorder="little").tobytes(), "little")


def _signed(value: int) -> int:
    return value - 2**32 if value >> 31 else value


def _permute(high: np.ndarray, low: np.ndarray, select: np.ndarray) -> np.ndarray:
    both = low.astype(U64) | high.astype(U64) << U64(32)
    result = np.zeros(select.shape, U32)
    for byte in range(4):
        chosen = select >> U32(8 * byte) & U32(0xFF)
        if not ((chosen < 8) | (chosen == 12)).all():
            raise Fault("v_perm_b32 selects a sign or 0xff")
        picked = both >> (chosen & U32(7)).astype(U64) * U64(8) & U64(0xFF)
        result |= np.where(chosen == 12, 0, picked).astype(U32) << U32(8 * byte)
    return result


def _to_u32(value: np.ndarray) -> np.ndarray:
    return np.clip(np.trunc(value.astype(np.float64)), 0, MASK32).astype(U64).astype(U32)


VECTOR: dict[str, tuple[str, Callable[..., np.ndarray]]] = {
    "v_mov_b32": ("u", lambda a: a),
    "v_mov_b64": ("U", lambda a: a),
    "v_not_b32": ("u", lambda a: ~a),
    "v_and_b32": ("uu", lambda a, b: a & b),
    "v_or_b32": ("uu", lambda a, b: a | b),
    "v_xor_b32": ("uu", lambda a, b: a ^ b),
    "v_or3_b32": ("uuu", lambda a, b, c: a | b | c),
    "v_and_or_b32": ("uuu", lambda a, b, c: a & b | c),
    "v_add_u32": ("uu", lambda a, b: a + b),
    "v_sub_u32": ("uu", lambda a, b: a - b),
    "v_subrev_u32": ("uu", lambda a, b: b - a),
    "v_add3_u32": ("uuu", lambda a, b, c: a + b + c),
    "v_min_u32": ("uu", np.minimum),
    "v_max_u32": ("uu", np.maximum),
    "v_mul_lo_u32": ("uu", lambda a, b: a * b),
    "v_mul_hi_u32": ("uu", lambda a, b: (a.astype(U64) * b.astype(U64) >> U64(32)).astype(U32)),
    "v_lshlrev_b32": ("uu", lambda a, b: b << (a & U32(31))),
    "v_lshrrev_b32": ("uu", lambda a, b: b >> (a & U32(31))),
    "v_lshlrev_b64": ("uU", lambda a, b: b << (a & U32(63)).astype(U64)),
    "v_lshrrev_b64": ("uU", lambda a, b: b >> (a & U32(63)).astype(U64)),
    "v_lshl_add_u32": ("uuu", lambda a, b, c: (a << (b & U32(31))) + c),
    "v_lshl_or_b32": ("uuu", lambda a, b, c: a << (b & U32(31)) | c),
    "v_lshl_add_u64": ("UuU", lambda a, b, c: (a << (b & U32(63)).astype(U64)) + c),
    "v_bfe_u32": (
        "uuu",
        lambda a, b, c: a >> (b & U32(31)) & ((U32(1) << (c & U32(31))) - U32(1)),
    ),
    "v_perm_b32": ("uuu", _permute),
    "v_cvt_f32_u32": ("u", lambda a: a.astype(F32)),
    "v_cvt_u32_f32": ("f", _to_u32),
    "v_ashrrev_i32": ("ui", lambda a, b: b >> (a & U32(31)).astype(I32)),
    "v_rcp_iflag_f32": ("f", lambda a: F32(1) / a),
    "v_rcp_f32": ("f", lambda a: F32(1) / a),
    "v_mul_f32": ("ff", lambda a, b: a * b),
}
"""Types of the sources, and what is made of them in all lanes."""

COMPARE = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lg": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}
SCALAR: dict[str, Callable[[int, int], int]] = {
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "andn2": lambda a, b: a & ~b,
}
HALF = {"load": "_d16", "store": "_d16_hi"}
"""The half of a register that a byte comes into or goes from."""
GLOBAL_BYTES = {"ubyte": 1, "byte": 1, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}


class Wave:
    """The threads of one block that run together, one instruction after the other."""

    def __init__(
        self,
        kernel: Kernel,
        memory: Memory,
        args: int,
        block: int,
        first: int,
        executed: Counter[str],
    ) -> None:
        self.kernel, self.memory, self.executed = kernel, memory, executed
        self.lanes = kernel.lanes
        self.all_on = 2**self.lanes - 1
        self.vector = np.full((256, self.lanes), 0xDEADBEEF, U32)
        self.vector[0] = np.arange(first, first + self.lanes)
        self.scalar = dict(enumerate((args & MASK32, args >> 32), kernel.first_scalar))
        self.special = {"exec": self.all_on, "vcc": 0, "ttmp9": block}
        if kernel.block != "ttmp9":
            self.write_scalar(kernel.block, block)
        self.scc = False
        self.pc = 0
        self.loads: list[set[str]] = []  # in flight, in order; a store is an empty set
        self.scalar_loads: set[str] = set()

    def run(self) -> None:
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            for _ in range(MAX_STEPS):
                instruction = self.kernel.code[self.pc]
                self.pc += 1
                self.executed[instruction.name] += 1
                if instruction.name == "s_endpgm":
                    return
                self.execute(instruction)
        raise Fault(f"{self.kernel.name} does not end")

    def execute(self, instruction: Instruction) -> None:
        name = instruction.name
        if name == "s_waitcnt":
            self.wait(instruction.operands)
            return
        self.check_waited(instruction.operands)
        if name in NO_EFFECT:
            return
        if name == "dual":
            self.run_both(*_halves(instruction.text))
        elif name.startswith(("s_branch", "s_cbranch")):
            self.branch(instruction)
        elif name.startswith("s_"):
            self.run_scalar(instruction)
        elif name.startswith(("global_load", "global_store")):
            self.run_global(instruction)
        else:
            self.run_vector(instruction)

    @property
    def on(self) -> np.ndarray:
        """The lanes that are."""
        return lanes_of(self.special["exec"], self.lanes)

    def mask(self, text: str) -> np.ndarray:
        return lanes_of(self.read_scalar(text) & self.all_on, self.lanes)

    # what is in flight

    def wait(self, counters: list[str]) -> None:
        for counter in counters:
            kind, count = re.fullmatch(r"(\w+)\((\d+)\)", counter).groups()
            if kind == "vmcnt":
                self.loads = self.loads[max(0, len(self.loads) - int(count)) :]
            elif kind == "lgkmcnt" and int(count) == 0:
                self.scalar_loads = set()
            else:
                raise Fault(f"unknown counter {counter}")

    def check_waited(self, operands: list[str]) -> None:
        flying = self.scalar_loads.union(*self.loads)
        if flying and (early := flying & _parts(operands)):
            raise Fault(f"{min(early)} is touched before its load was waited for")

    # operands

    def read_scalar(self, text: str) -> int:
        operand = operand_of(text)
        if operand.kind == "special":
            return self.special[operand.name]
        if operand.kind == "literal":
            return operand.index & MASK64
        if operand.kind == "s":
            parts = range(operand.index, operand.index + operand.count)
            if missing := [part for part in parts if part not in self.scalar]:
                raise Fault(f"s{missing[0]} is read before it is written")
            return sum(self.scalar[part] << 32 * i for i, part in enumerate(parts))
        raise Fault(f"{text} is no scalar")

    def write_scalar(self, text: str, value: int) -> None:
        operand = operand_of(text)
        if operand.kind == "special":
            self.special[operand.name] = value & self.all_on
        elif operand.kind == "s":
            for i in range(operand.count):
                self.scalar[operand.index + i] = value >> 32 * i & MASK32
        elif operand.kind != "null":
            raise Fault(f"{text} is no scalar")

    def read(self, text: str, kind: str) -> np.ndarray:
        """A source of a vector instruction in all lanes: u, i, f (32 bits) or U (64)."""
        operand = operand_of(text)
        if operand.kind == "v" and kind == "U":
            low, high = self.vector[operand.index], self.vector[operand.index + 1]
            return low.astype(U64) | high.astype(U64) << U64(32)
        if operand.kind == "v":
            return self.vector[operand.index].view(TYPES[kind])
        value = self.read_scalar(text)
        if kind == "U":
            return np.full(self.lanes, value, U64)
        return np.full(self.lanes, value & MASK32, U32).view(TYPES[kind])

    def write(self, text: str, value: np.ndarray) -> None:
        operand, on = operand_of(text), self.on
        if operand.kind != "v" or operand.count * 4 != value.dtype.itemsize:
            raise Fault(f"{value.dtype} into {text}")
        parts = np.ascontiguousarray(value).view(U32).reshape(self.lanes, operand.count)
        for i in range(operand.count):
            self.vector[operand.index + i][on] = parts[on, i]

    # instructions

    def run_both(self, first: Instruction, second: Instruction) -> None:
        """Both read before either writes."""
        before = self.vector.copy()
        self.run_vector(first)
        written, self.vector = self.vector, before
        self.run_vector(second)
        to = operand_of(first.operands[0]).index
        self.vector[to] = written[to]

    def branch(self, instruction: Instruction) -> None:
        taken = {
            "s_branch": True,
            "s_cbranch_scc0": not self.scc,
            "s_cbranch_scc1": self.scc,
            "s_cbranch_vccz": not self.special["vcc"],
            "s_cbranch_vccnz": bool(self.special["vcc"]),
            "s_cbranch_execz": not self.special["exec"],
            "s_cbranch_execnz": bool(self.special["exec"]),
        }
        if taken[instruction.name]:
            self.pc = self.kernel.labels[instruction.operands[0]]

    def run_scalar(self, instruction: Instruction) -> None:
        name, (to, *sources) = instruction.name, instruction.operands
        if name.startswith("s_load_dword"):
            self.load_scalar(name, to, *sources)
            return
        if name.endswith("_f32") or "_f32_" in name:  # as the vector instruction of that name
            kinds, compute = VECTOR[name.replace("s_", "v_", 1)]
            values = [self.read(*pair)[:1] for pair in zip(sources, kinds, strict=True)]
            self.write_scalar(to, int(compute(*values).view(U32)[0]))
            return
        _, op, kind = re.fullmatch(r"(s_)(\w+)_([biu]\d+)", name).groups()
        mask = MASK64 if kind.endswith("64") else MASK32
        if op.startswith("cmp_"):
            a, b = (self.read_scalar(source) & mask for source in (to, *sources))
            a, b = (_signed(a), _signed(b)) if kind == "i32" else (a, b)
            self.scc = COMPARE[op[4:]](a, b)
            return
        if op == "addk":  # to what is in the register
            op, sources = "add", [to, *sources]
        a, b = (self.read_scalar(source) & mask for source in (*sources, *sources)[:2])
        if op.endswith("_saveexec"):
            value = SCALAR[op.removesuffix("_saveexec")](a, self.special["exec"])
            self.write_scalar(to, self.special["exec"])
            self.special["exec"], self.scc = value & mask, bool(value & mask)
            return
        self.write_scalar(to, self.scalar_result(instruction, op, kind, a, b) & mask)

    def scalar_result(self, instruction: Instruction, op: str, kind: str, a: int, b: int) -> int:
        """Sets scc where the instruction does."""
        bits = int(kind[1:])
        match op:
            case "mov":
                return a
            case "cselect":
                return a if self.scc else b
            case "abs":
                value = abs(_signed(a))
            case "ashr" if kind == "i32":
                value = (_signed(a) >> (b & 31)) & MASK32
            case "mul":
                return a * b
            case "mul_hi":
                return a * b >> 32
            case "add" | "sub" if kind == "i32":
                exact = _signed(a) + (_signed(b) if op == "add" else -_signed(b))
                self.scc = not -(2**31) <= exact < 2**31
                return exact
            case "add" | "sub" if kind == "u32":
                exact = a + b if op == "add" else a - b
                self.scc = not 0 <= exact < 2**32
                return exact
            case "addc" | "subb":
                exact = a + b + self.scc if op == "addc" else a - b - self.scc
                self.scc = not 0 <= exact < 2**32
                return exact
            case "lshl" | "lshr":
                by = b & bits - 1
                value = (a << by if op == "lshl" else a >> by) & 2**bits - 1
            case _ if op in SCALAR:
                value = SCALAR[op](a, b) & 2**bits - 1
            case _:
                raise Fault(f"unknown CDNA instruction {instruction.text}")
        self.scc = bool(value)
        return value

    def load_scalar(self, name: str, to: str, base: str, offset: str) -> None:
        count = int(name.removeprefix("s_load_dword").removeprefix("x") or 1)
        address = self.read_scalar(base) + int(offset, 0)
        for i in range(count):
            (word,) = self.memory.load(np.array([address + 4 * i], U64), 4).view(U32)[0]
            self.scalar[operand_of(to).index + i] = int(word)
        self.scalar_loads |= _parts([to])

    def run_global(self, instruction: Instruction) -> None:
        name, operands = instruction.name, instruction.operands
        found = re.fullmatch(r"global_(load|store)_(\w+?)(_d16|_d16_hi)?", name)
        if not found or found[2] not in GLOBAL_BYTES or found[3] not in (None, HALF[found[1]]):
            raise Fault(f"unknown CDNA instruction {instruction.text}")
        is_load, size = found[1] == "load", GLOBAL_BYTES[found[2]]
        register, address, base = operands if is_load else [operands[1], operands[0], operands[2]]
        on = self.on
        if is_load:
            self.loads.append(_parts([register]))
        elif self.lanes == 64:  # RDNA counts its stores by themselves
            self.loads.append(set())
        if not on.any():
            return
        if base == "off":
            where = self.read(address, "U")
        else:
            where = self.read(address, "u").astype(U64) + U64(self.read_scalar(base))
        where = (where + U64(instruction.modifiers.get("offset", 0) & MASK64))[on]
        first = operand_of(register).index
        words = range(first, first + -(-size // 4))
        if is_load:
            data = self.memory.load(where, size)
            data = np.pad(data, ((0, 0), (0, -size % 4))).view(U32)  # a byte fills its register
            for i, word in enumerate(words):
                kept = self.vector[word][on] & U32(0xFFFF0000 if found[3] else 0)
                self.vector[word][on] = data[:, i] | kept
            return
        values = np.stack(
            [self.vector[word][on] >> U32(16 if found[3] else 0) for word in words], 1
        )
        self.memory.store(where, np.ascontiguousarray(values).view(np.uint8)[:, :size])

    def run_vector(self, instruction: Instruction) -> None:
        name, (to, *sources) = instruction.name, instruction.operands
        on = self.on
        if name in VECTOR:
            kinds, compute = VECTOR[name]
            values = [self.read(*pair) for pair in zip(sources, kinds, strict=True)]
            self.write(to, compute(*values))
        elif compare := re.fullmatch(r"v_cmp_(\w\w)_([ui])(32|64)", name):
            kind = {"u32": "u", "i32": "i", "u64": "U", "i64": "U"}[compare[2] + compare[3]]
            a, b = (self.read(source, kind) for source in sources)
            if compare[2] + compare[3] == "i64":
                a, b = a.view(np.int64), b.view(np.int64)
            self.write_scalar(to, mask_of(COMPARE[compare[1]](a, b) & on))
        elif name == "v_cndmask_b32":
            chosen = self.mask(sources[2])
            self.write(to, np.where(chosen, self.read(sources[1], "u"), self.read(sources[0], "u")))
        elif name == "v_readfirstlane_b32":
            lane = int(np.argmax(on))
            self.write_scalar(to, int(self.read(sources[0], "u")[lane]))
        elif carry := re.fullmatch(r"v_(add|sub|addc|subb)_co_u32", name):
            self.carry(carry[1], to, sources, on)
        elif name == "v_mad_u64_u32":
            product = self.read(sources[1], "u").astype(U64) * self.read(sources[2], "u").astype(
                U64
            )
            total = product + self.read(sources[3], "U")
            self.write_scalar(sources[0], mask_of((total < product) & on))
            self.write(to, total)
        elif name == "v_bitop3_b32":
            self.write(to, self.any_logic(sources, instruction.modifiers["bitop3"]))
        elif name == "v_pk_mov_b32" and sources[2:] in ([], ["op_sel:[0,1]"]):
            low, high = (self.read(source, "U") for source in sources[:2])
            high = high & U64(MASK64 ^ MASK32) if sources[2:] else high << U64(32)
            self.write(to, low & U64(MASK32) | high)
        else:
            raise Fault(f"unknown CDNA instruction {instruction.text}")

    def carry(self, op: str, to: str, sources: list[str], on: np.ndarray) -> None:
        a, b = (self.read(source, "u").astype(np.int64) for source in sources[1:3])
        given = self.mask(sources[3]) if op in ("addc", "subb") else 0
        exact = a + b + given if op.startswith("add") else a - b - given
        self.write_scalar(sources[0], mask_of(((exact < 0) | (exact > MASK32)) & on))
        self.write(to, (exact & MASK32).astype(U32))

    def any_logic(self, sources: list[str], table: int) -> np.ndarray:
        """Bit by bit, table[a << 2 | b << 1 | c]."""
        inputs = [self.read(source, "u") for source in sources]
        result = np.zeros(self.lanes, U32)
        for row in range(8):
            if table >> row & 1:
                terms = (x if row >> 2 - i & 1 else ~x for i, x in enumerate(inputs))
                result |= functools.reduce(operator.and_, terms)
        return result


def _parts(operands: list[str]) -> set[str]:
    """The single registers of operands: v[2:3] is v2 and v3."""
    return functools.reduce(operator.or_, map(_parts_of, operands), set())


@functools.cache
def _parts_of(text: str) -> frozenset[str]:
    if not re.match(r"[vs](\d|\[)", text):
        return frozenset()
    operand = operand_of(text)
    return frozenset(f"{operand.kind}{operand.index + i}" for i in range(operand.count))
