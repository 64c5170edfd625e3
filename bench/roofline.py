"""The least that each kernel must do, and the time that follows from a chip's data sheet.

    python bench/roofline.py            # the table of docs/kernels.md

A floor is the largest of four times: matrix units, ordinary float32 pipes, device memory, and the
port through which a multiprocessor reads the L2 cache. No kernel is faster; what a kernel reaches
of it is measured by bench/gpu_gate.py.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """Data-sheet rates. ``port``: 64 bytes per clock and multiprocessor; ``scalar``: 128 float32
    instructions per clock and multiprocessor on Hopper, 64 on Ampere."""

    name: str
    matrix: float  # bf16 FLOP/s, dense
    scalar: float  # instructions/s
    memory: float  # bytes/s
    port: float  # bytes/s


# H200 SXM: 989 TFLOP/s, 132 multiprocessors at 1.83 GHz (67 TFLOP/s float32), 4.8 TB/s. A100 SXM
# 80 GB: 312 TFLOP/s, 108 at 1.41 GHz, 2.04 TB/s.
H200 = Chip("H200", 989e12, 132 * 128 * 1.83e9, 4.8e12, 132 * 64 * 1.83e9)
A100 = Chip("A100", 312e12, 108 * 64 * 1.41e9, 2.04e12, 108 * 64 * 1.41e9)


@dataclass(frozen=True)
class Work:
    """What a call must do at the least. Bytes of device memory count each input and output once;
    ``cache`` counts what the tiles read again from L2."""

    kernel: str
    shape: str
    matrix: float = 0.0  # FLOP
    scalar: float = 0.0  # instructions beside the matrix units
    memory: float = 0.0
    cache: float = 0.0

    def times(self, chip: Chip) -> dict[str, float]:
        return {
            "matrix": self.matrix / chip.matrix,
            "float32": self.scalar / chip.scalar,
            "memory": self.memory / chip.memory,
            "L2 port": self.cache / chip.port,
        }

    def floor(self, chip: Chip) -> tuple[float, str]:
        bound, seconds = max(self.times(chip).items(), key=lambda item: item[1])
        return seconds, bound


def fused(rows: int, cols: int, examples: int, tokens: int, tile: tuple[int, int]) -> Work:
    """Weight gradient, T per parameter: the product, and at each example's end a fused multiply-add
    for the square and an add to the running gradient, per weight."""
    n = examples * tokens
    tiles = -(-rows // tile[0]) * -(-cols // tile[1])
    sums = examples * tiles * (tile[0] // 16) * 4
    return Work(
        f"cross_influence, {tile[0]}x{tile[1]}",
        f"{rows}x{cols}, {examples} x {tokens}",
        2 * n * rows * cols,
        2 * examples * rows * cols,
        2 * n * (rows + cols) + 2 * rows * cols + sums,
        2 * n * (tile[0] + tile[1]) * tiles,
    )


def gram(rows: int, cols: int, examples: int, tokens: int, tile: int = 64) -> Work:
    """T alone from token-by-token products: the lower triangle of pairs of token blocks."""
    blocks = -(-tokens // tile)
    pairs = examples * blocks * (blocks + 1) // 2
    return Work(
        "gram (T alone)",
        f"{rows}x{cols}, {examples} x {tokens}",
        pairs * 2 * tile * tile * (rows + cols),
        pairs * tile * tile,
        2 * examples * tokens * (rows + cols),
        pairs * 2 * 2 * tile * (rows + cols),
    )


def sparse(rows: int, cols: int, tokens: int, share: float, tile: int = 128) -> Work:
    tiles = round(share * (rows // tile) * (cols // tile))
    return Work(
        f"sparse_wgrad, {share:.0%} of {tile}x{tile}",
        f"{rows}x{cols}, {tokens} tokens",
        2 * tokens * tiles * tile * tile,
        0,
        2 * tokens * (rows + cols) + 4 * tiles * tile * tile,
        2 * tokens * 2 * tile * tiles,
    )


def statistics(elements: float) -> Work:
    """Magnitude, multiply-add, add, maximum; bfloat16 read once."""
    return Work("grad_stats", f"{elements:.0e} bf16", 0, 4 * elements, 2 * elements)


def adamw(elements: float, what: str) -> Work:
    """About 20 instructions (two divisions and a square root among them); 28 bytes: float32 master,
    two moments read and written, bfloat16 gradient read, bfloat16 weight written."""
    return Work("adamw_", what, 0, 20 * elements, 28 * elements)


def embedding(tokens: int, width: int) -> Work:
    return Work("embedding_influence", f"{tokens} tokens of {width}", 0, 2 * tokens * width,
                2 * tokens * width + 24 * tokens)  # fmt: skip


def norms(tokens: int, width: int) -> Work:
    return Work("norm_gradients", f"{tokens} x {width}", 0, 4 * tokens * width,
                4 * tokens * width + 8 * tokens)  # fmt: skip


WORK = (
    fused(4096, 4096, 8, 2048, (128, 128)),
    fused(4096, 4096, 8, 2048, (128, 256)),
    fused(14336, 4096, 8, 2048, (128, 128)),
    fused(4096, 4096, 8, 512, (128, 128)),
    fused(4096, 4096, 64, 128, (128, 128)),
    gram(4096, 4096, 8, 512),
    gram(4096, 4096, 64, 128),
    sparse(4096, 4096, 16384, 0.2),
    statistics(2e9),
    adamw(7e8, "7e8 weights"),
    adamw(1.4e8, "20% of 7e8"),
    embedding(8192, 4096),
    norms(16384, 4096),
)


def table() -> str:
    lines = [
        "| kernel | shape | GFLOP | float32 G | memory MB | L2 to chip MB | H200 floor | by "
        "| A100 floor | by |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for w in WORK:
        cells = [w.kernel, w.shape, *(f"{x / 1e9:.1f}" for x in (w.matrix, w.scalar))]
        cells += [f"{w.memory / 1e6:.0f}", f"{w.cache / 1e6:.0f}" if w.cache else "–"]
        for chip in (H200, A100):
            seconds, bound = w.floor(chip)
            cells += [f"{seconds * 1e6:.0f} us", bound]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def overhead(examples: int, tokens: int, chip: Chip, rows: int = 4096, cols: int = 4096) -> float:
    """Predicted time of dW + T over dW if the work at example boundaries adds to that of the
    matrix units, both at their data-sheet rates."""
    t = fused(rows, cols, examples, tokens, (128, 128)).times(chip)
    return (t["matrix"] + t["float32"]) / t["matrix"]


def gram_overhead(examples: int, tokens: int, chip: Chip) -> float:
    """The same for the weight gradient by the library and T by the Gram kernel."""
    product = fused(4096, 4096, examples, tokens, (128, 128)).times(chip)["matrix"]
    return 1 + gram(4096, 4096, examples, tokens).floor(chip)[0] / product


def predictions() -> str:
    lines = [
        "| 4096x4096, examples x tokens | fused, H200 | Gram, H200 | fused, A100 | Gram, A100 |",
        "|---|---|---|---|---|",
    ]
    for examples, tokens in ((8, 2048), (8, 512), (64, 128), (128, 64)):
        cells = [f"{examples} x {tokens}"]
        for chip in (H200, A100):
            cells += [f"{overhead(examples, tokens, chip):.2f}",
                      f"{gram_overhead(examples, tokens, chip):.2f}"]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(), "\n\n" + predictions())
