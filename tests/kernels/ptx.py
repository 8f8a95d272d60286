"""Executes PTX without a GPU: numpy over the threads of a block, the lowest instruction first.

Knows what NVRTC and Triton write for our kernels; anything else is a Fault that names it. Not
modelled: time, caches, the order of memory.
"""

import re
from collections import Counter
from typing import NamedTuple

import numpy as np

from .memory import Fault, Memory

U32, U64 = np.uint32, np.uint64
TYPES = {
    "u8": np.uint8,
    "b8": np.uint8,
    "u16": np.uint16,
    "b16": np.uint16,
    "u32": U32,
    "b32": U32,
    "s32": np.int32,
    "u64": U64,
    "b64": U64,
    "s64": np.int64,
    "pred": np.bool_,
}
SPACES = ("%tid", "%ctaid", "%ntid", "%nctaid")
COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
BINARY = {
    "add": np.add,
    "sub": np.subtract,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "min": np.minimum,
    "max": np.maximum,
    "div": np.floor_divide,
    "rem": np.remainder,
}
CACHE_HINTS = {"nc", "cg", "cs", "ca", "lu", "cv", "wb", "wt"}
MAX_STEPS = 500_000


class Instruction(NamedTuple):
    guard: str  # "", "%p1" or "!%p1"
    words: list[str]  # "ld.global.u32" split at the dots
    operands: list[str]


class Kernel(NamedTuple):
    name: str
    parameters: dict[str, int]  # where each begins
    registers: dict[str, np.dtype]  # by prefix: "%rd" -> uint64
    code: list[Instruction]
    labels: dict[str, int]


def parse(text: str) -> dict[str, Kernel]:
    entries = re.findall(r"\.entry (\w+)\(\s*(.*?)\s*\)[^{]*\{(.*?)\n\}", text, re.DOTALL)
    return {name: _kernel(name, given, body) for name, given, body in entries}


def _kernel(name: str, given: str, body: str) -> Kernel:
    kernel = Kernel(name, _parameters(name, given), {}, [], {})
    for line in body.splitlines():
        statement = line.partition("//")[0].strip()
        if declared := re.fullmatch(r"\.reg \.(\w+)\s+(%\w+)<\d+>;", statement):
            kernel.registers[declared[2]] = np.dtype(TYPES[declared[1]])
        elif label := re.fullmatch(r"(\$\w+):", statement):
            kernel.labels[label[1]] = len(kernel.code)
        elif found := re.fullmatch(r"(?:@(!?%p\d+)\s+)?([a-z][\w.]*)\s*(.*);", statement):
            operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", found[3])
            kernel.code.append(Instruction(found[1] or "", found[2].split("."), operands))
        elif statement and not statement.startswith((".pragma", ".loc")):
            raise Fault(f"unknown PTX statement {statement!r}")
    return kernel


def _parameters(name: str, given: str) -> dict[str, int]:
    """Of one struct, or of words and pointers: where each begins."""
    if struct := re.fullmatch(r"\.param \.align 8 \.b8 (\w+)\[\d+\]", given):
        return {struct[1]: 0}
    places, at = {}, 0
    for one in given.split(","):
        pattern = r"\s*\.param \.u(32|64)(?: \.ptr \.global \.align \d+)? (\w+)\s*"
        if not (word := re.fullmatch(pattern, one)):
            raise Fault(f"{name} takes {one.strip()}")
        size = int(word[1]) // 8
        at = -(-at // size) * size
        places[word[2]] = at
        at += size
    return places


def launch(
    kernel: Kernel, memory: Memory, args: bytes, grid: int, block: int, executed: Counter[str]
) -> None:
    for index in range(grid):
        Block(kernel, memory, args, index, block, executed).run()


class Block:
    """The threads of one block; `self.on` are those that run the current instruction."""

    def __init__(
        self,
        kernel: Kernel,
        memory: Memory,
        args: bytes,
        index: int,
        threads: int,
        executed: Counter[str],
    ) -> None:
        self.kernel, self.memory, self.args, self.executed = kernel, memory, args, executed
        self.threads = threads
        self.special = {
            "%tid.x": np.arange(threads, dtype=U32),
            "%ctaid.x": np.full(threads, index, U32),
        }
        self.registers: dict[str, np.ndarray] = {}
        self.pc = np.zeros(threads, np.int64)
        self.on = np.arange(threads)

    def run(self) -> None:
        code = self.kernel.code
        for _ in range(MAX_STEPS):
            at = int(self.pc.min())
            if at >= len(code):
                return
            instruction = code[at]
            self.on = np.nonzero(self.pc == at)[0]
            self.pc[self.on] = at + 1
            if guard := instruction.guard:
                taken = self.read(guard.lstrip("!"), "pred")
                self.on = self.on[~taken if guard[0] == "!" else taken]
            self.executed[".".join(instruction.words)] += 1
            if len(self.on):
                self.execute(instruction)
        raise Fault(f"{self.kernel.name} does not end")

    def read(self, operand: str, kind: str) -> np.ndarray:
        """An operand in the threads that are on, its bits as the type `kind`."""
        wanted = np.dtype(TYPES[kind])
        if not operand.startswith("%"):
            bits = int(operand, 0) & (256**wanted.itemsize - 1)
            return np.full(len(self.on), bits, f"u{wanted.itemsize}").view(wanted)
        held = self.special.get(operand)
        if held is None:
            held = self.registers.get(operand)
        if held is None:
            raise Fault(f"{operand} is read before it is written")
        value = held[self.on]
        if value.dtype.itemsize > wanted.itemsize:  # the low bits, as st.u8 takes them
            return value.astype(f"u{wanted.itemsize}").view(wanted)
        return value.view(wanted)

    def write(self, register: str, value: np.ndarray) -> None:
        if register not in self.registers:
            kind = self.kernel.registers[register.rstrip("0123456789")]
            self.registers[register] = np.zeros(self.threads, kind)
        held = self.registers[register]
        if value.dtype.itemsize < held.dtype.itemsize:  # ld.u8 into 16 bits
            value = value.astype(held.dtype)
        held[self.on] = value.view(held.dtype)

    def execute(self, instruction: Instruction) -> None:
        words, operands = instruction.words, instruction.operands
        match words:
            case ["bra"] | ["bra", "uni"]:
                self.pc[self.on] = self.kernel.labels[operands[0]]
            case ["ret"]:
                self.pc[self.on] = len(self.kernel.code)
            case ["ld", "param", *_, kind]:
                self.load_parameter(operands, kind)
            case ["ld", "global", *hints, kind]:
                self.check_hints(hints, words)
                self.load(operands, kind)
            case ["st", "global", *hints, kind]:
                self.check_hints(hints, words)
                self.store(operands, kind)
            case _:
                self.write(operands[0], self.compute(words, operands[1:]))

    def compute(self, words: list[str], operands: list[str]) -> np.ndarray:
        op, kind = words[0], words[-1]

        def operand(index: int, as_kind: str = kind) -> np.ndarray:
            return self.read(operands[index], as_kind)

        with np.errstate(over="ignore"):
            match words:
                case ["mov", _]:
                    return operand(0)
                case ["cvt", to, source]:
                    return operand(0, source).astype(TYPES[to])
                case ["setp", compare, _] if compare in COMPARE:
                    return COMPARE[compare](operand(0), operand(1))
                case ["selp", _]:
                    return np.where(operand(2, "pred"), operand(0), operand(1))
                case ["not", _]:
                    return ~operand(0)
                case ["mul", "wide", "u32" | "s32"]:
                    wide = U64 if kind == "u32" else np.int64
                    return operand(0).astype(wide) * operand(1).astype(wide)
                case ["mul", "lo", _]:
                    return operand(0) * operand(1)
                case ["mad", "lo", _]:
                    return operand(0) * operand(1) + operand(2)
                case ["shl" | "shr", "b32" | "u32" | "b64" | "u64"] | ["shr", "s32" | "s64"]:
                    return self.shift(op, operand(0), operand(1, "u32"))
                case ["div" | "rem", _] if not operand(1).all():
                    raise Fault("division by zero")
                case ["div" | "rem", "s32" | "s64"] if (operand(0) | operand(1) < 0).any():
                    raise Fault("division of what is below zero")
                case [("add" | "sub" | "and" | "or" | "xor" | "min" | "max"), _] | [
                    "div" | "rem",
                    "u32" | "u64" | "s32" | "s64",
                ]:
                    return BINARY[op](operand(0), operand(1))
        raise Fault(f"unknown PTX instruction {'.'.join(words)}")

    def shift(self, op: str, value: np.ndarray, by: np.ndarray) -> np.ndarray:
        """PTX clamps: what is shifted by all of its bits is 0, or -1 where the sign comes in."""
        bits = value.dtype.itemsize * 8
        if value.dtype.kind == "i":
            return value >> np.minimum(by, bits - 1).astype(value.dtype)
        inside = np.minimum(by, bits - 1).astype(value.dtype)
        shifted = value << inside if op == "shl" else value >> inside
        return np.where(by < bits, shifted, value.dtype.type(0))

    def check_hints(self, hints: list[str], words: list[str]) -> None:
        if not set(hints) <= CACHE_HINTS | {"v2", "v4"}:
            raise Fault(f"unknown PTX instruction {'.'.join(words)}")

    def load_parameter(self, operands: list[str], kind: str) -> None:
        where = re.fullmatch(r"\[(\w+)(?:\+(\d+))?\]", operands[1])
        if not where or where[1] not in self.kernel.parameters:
            raise Fault(f"ld.param of {operands[1]}")
        begin = self.kernel.parameters[where[1]] + int(where[2] or 0)
        size = np.dtype(TYPES[kind]).itemsize
        for index, register in enumerate(re.findall(r"%\w+", operands[0])):
            start = begin + index * size
            value = np.frombuffer(self.args[start : start + size], TYPES[kind])
            self.write(register, np.repeat(value, len(self.on)))

    def addresses(self, operand: str) -> np.ndarray:
        place = operand.replace(" ", "")
        register, offset = re.fullmatch(r"\[(%\w+)(?:\+(-?\d+))?\]", place).groups()
        with np.errstate(over="ignore"):
            return self.read(register, "u64") + np.int64(offset or 0).astype(U64)

    def load(self, operands: list[str], kind: str) -> None:
        registers, size = re.findall(r"%\w+", operands[0]), np.dtype(TYPES[kind]).itemsize
        data = self.memory.load(self.addresses(operands[1]), size * len(registers))
        for index, register in enumerate(registers):
            part = np.ascontiguousarray(data[:, index * size : (index + 1) * size])
            self.write(register, part.view(TYPES[kind])[:, 0])

    def store(self, operands: list[str], kind: str) -> None:
        values = [self.read(register, kind) for register in re.findall(r"%\w+", operands[1])]
        data = np.ascontiguousarray(np.stack(values, 1)).view(np.uint8)
        self.memory.store(self.addresses(operands[0]), data)
